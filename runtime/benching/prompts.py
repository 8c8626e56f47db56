"""Prompts to measure guesses with (`runtime.bench --speculate`), by how much of the reply stands in the prompt already.

edit: most of it does (change a word, fill in a form, quote). rewrite: names, terms and phrases do (summarize, translate, go on with
code). chat: next to nothing. All written for this.
"""

_LETTER = """Dear Ms Okafor,

thank you for your letter of 3 March about the reading room on the second floor. We have looked into the matter together with the
head of the library and the caretaker. The radiators in the reading room were last serviced in October, and the valve beside the
window was found to be stuck. The caretaker will replace it on Thursday, and until then two electric heaters will stand at the
long table. The opening hours of the reading room remain as they are: from nine in the morning to six in the evening, and on
Saturdays until one. We apologise for the cold and hope to see you again soon.

With kind regards,
Tomas Lindqvist, city library"""

_FORM = """{"order": {"number": "A-20417", "customer": {"name": "", "street": "", "city": "", "postcode": ""},
 "items": [{"article": "", "colour": "", "quantity": 0, "price_each": 0.0}], "delivery": {"date": "", "express": false}}}"""

_REPORT = """The lighthouse on Grey Skerry was built in 1871 from granite that was cut on the mainland and shipped over in one
summer. Its lamp burned paraffin until 1924, when the tower was given an electric lamp and a generator of its own. The last keeper,
Ingrid Solberg, left the island in 1978, after the light had been made automatic. The tower is 31 metres high and its light is seen at
19 nautical miles. In a storm in January 2005 the sea broke two windows of the lamp room, 24 metres above the water. Since 2011 the
keeper's house has been a field station for seabird research: every summer four students count puffins, razorbills and kittiwakes.
The puffins have become fewer, from 2,100 pairs in 2011 to 1,350 in 2023, and the station's head, Dr Amal Haddad, puts it down to sand
eels that have moved north into colder water. The kittiwakes have held their number, and razorbills have increased by a fifth."""

_CODE = '''class Account:
    """Money in whole cents, and who may draw it."""

    def __init__(self, owner, balance_cents=0):
        self.owner = owner
        self.balance_cents = balance_cents
        self.history = []

    def deposit(self, amount_cents, note=""):
        """Add an amount. Raises ValueError unless it is positive."""
        if amount_cents <= 0:
            raise ValueError("the amount must be positive")
        self.balance_cents += amount_cents
        self.history.append(("deposit", amount_cents, note))
        return self.balance_cents
'''

_TERMS = """Terms: pump station = Pumpwerk; pressure valve = Druckventil; flow meter = Durchflussmesser; control cabinet = Schaltschrank;
standby mode = Bereitschaftsbetrieb.

Text: Before you open the control cabinet, put the pump station into standby mode. Close the pressure valve and wait until the flow
meter shows zero. Only then may the pressure valve be removed. After the work, close the control cabinet, open the pressure valve and
leave standby mode. Check the flow meter once more after ten minutes."""

PROMPTS = {
    "edit": (
        f"Copy the letter below word for word, but replace the word Thursday by Friday. Write nothing else.\n\n{_LETTER}",
        f"Repeat this text exactly, and correct nothing but the year 1871, which should be 1873:\n\n{_REPORT}",
        "Fill in this JSON form for Maria Silva, Harbour Street 12, Porto, 4000-091, who ordered three blue lamps, article L-77, at 24.5 "
        f"each, to be delivered on 2 May, not express. Answer with the JSON alone.\n\n{_FORM}",
        f"Which sentences of the following text speak of birds? Quote them word for word.\n\n{_REPORT}"),
    "rewrite": (
        f"Summarize this text in three sentences:\n\n{_REPORT}",
        f"Translate the text into German, using the terms given.\n\n{_TERMS}",
        "Write the method `withdraw` of this class, in the same style, and then a class `SavingsAccount` with a method `add_interest`:"
        f"\n\n{_CODE}",
        f"Write a short answer to this letter in the name of Ms Okafor, thanking for each thing that was promised:\n\n{_LETTER}"),
    "chat": (
        "I have a free weekend and a small garden with poor soil. What would you plant?",
        "Tell me a story about a clockmaker who cannot sleep.",
        "Explain to a child of ten why the sky is blue and sunsets are red.",
        "What should I think about before I learn to play the cello as a grown-up?")}
