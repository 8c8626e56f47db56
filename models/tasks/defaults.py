"""How each task asks where nobody says otherwise: its prompt, what ends an answer, what it is scored by.

| task       | records                                                                | answers                              |
|------------|------------------------------------------------------------------------|--------------------------------------|
| qa         | SQuAD; or context, question, answers                                   | a few words                          |
| summarize  | text, summary                                                          | a line                               |
| translate  | source, target; or two columns                                         | a line                               |
| classify   | text, label; or the first and the last column                          | a label                              |
| pair       | two texts and a label; or three columns                                | a label                              |
| regress    | one text or two, and a score; or two or three columns                  | a number, the mean of labels 0 to 5  |
| similarity | the same: for encoders, which compare embeddings                       |                                      |
| ner        | CoNLL: a token and its BIO tag a line; or tokens, tags                 | names with their kinds, as text      |
| instruct   | Alpaca; prompt and completion                                          | text                                 |
| chat       | messages, ShareGPT, Alpaca, SQuAD                                      | the assistant's reply, as text       |
| continue   | texts, whose first half is shown                                       | the other half                       |
"""

from runtime.task import Task

TASKS = ("qa", "summarize", "translate", "classify", "pair", "regress", "similarity", "ner", "instruct", "chat", "continue")
DECODER_TASKS = tuple(name for name in TASKS if name != "similarity")
_LABELLED = {"answer": "label", "max_new_tokens": 8, "metrics": ("accuracy", "precision", "recall", "macro_f1", "matthews")}
_ROUGE = ("rouge1", "rouge2", "rougeL")
_VARIETY = ("distinct1", "distinct2", "self_bleu")
DEFAULTS = {task.name: task for task in (
    Task(name="qa", instruction="Answer each question with a few words taken from the text.\n\n",
         example="Text: {context}\nQuestion: {question}\nAnswer:", max_new_tokens=24, metrics=("exact_match", "f1", "rougeL", "bleu")),
    Task(name="summarize", instruction="Summarize each description in one short line.\n\n", example="Description: {text}\nSummary:",
         max_new_tokens=32, metrics=(*_ROUGE, "bleu", "meteor", *_VARIETY)),
    Task(name="translate", instruction="Translate English to Chinese.\n\n", example="English: {source}\nChinese:", max_new_tokens=48,
         metrics=("bleu", "chrf")),
    Task(name="classify", instruction="Is the sentiment of each sentence negative or positive?\n\n", example="Sentence: {text}\nSentiment:",
         labels={"0": "negative", "1": "positive"}, **_LABELLED),
    Task(name="pair", instruction="Does the second sentence follow from the first?\n\n",
         example="First: {text}\nSecond: {text2}\nAnswer:", labels={"0": "no", "1": "yes"}, **_LABELLED),
    Task(name="regress", instruction="How alike in meaning are the two sentences, from 0 (not at all) to 5 (the same)?\n\n",
         example="First: {text}\nSecond: {text2}\nScore:", answer="number", labels={str(n): str(n) for n in range(6)}, max_new_tokens=8,
         metrics=("pearson", "spearman")),
    Task(name="ner", instruction="List the names in each text with their kinds, or write none.\n\n", example="Text: {text}\nNames:",
         max_new_tokens=64, metrics=("entity_f1", "entity_precision", "entity_recall")),
    Task(name="instruct", example="Instruction: {instruction}\n{input}\nResponse:", stop=("\nInstruction:",), max_new_tokens=128,
         metrics=("bleu", *_ROUGE, "meteor", "perplexity", *_VARIETY)),
    Task(name="chat", chat=True, max_new_tokens=128, metrics=("rougeL", "perplexity", *_VARIETY)),
    Task(name="continue", example="{text}", stop=("\n\n",), max_new_tokens=64, metrics=("perplexity", "rougeL", *_VARIETY)))}
SHOTS = {"qa": 1, "summarize": 3, "translate": 4, "classify": 4, "pair": 4, "regress": 4, "ner": 4, "instruct": 1}
IN_CHAT = {"instruct": {"example": "{prompt}"}}        # instruction and input, as one says it
# Where labels of the data are others than a default task's: no question can be put, but what stands where can be told.
OTHER_LABELS = {"classify": {"instruction": "", "example": "Text: {text}\nLabel:"},
                "pair": {"instruction": "", "example": "First: {text}\nSecond: {text2}\nLabel:"}}
