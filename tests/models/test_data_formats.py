"""Data files: every format is read as what it says, and what cannot be used is refused with its place."""

import csv
import json

import pandas
import pytest

from models.data.cleaning import clean, language_of, normalize
from models.data.corpus import DataOptions
from models.data.records import as_labelled, as_messages, as_text, find_sources, read_records, source_digest
from runtime.errors import UserError


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def records(path, **options):
    return list(read_records(find_sources([path]), **options))


@pytest.mark.parametrize("unit, expected", [
    ("file", ["one\ntwo\n\nthree\n"]), ("line", ["one", "two", "three"]), ("paragraph", ["one\ntwo", "three"])])
def test_text_units(tmp_path, unit, expected):
    path = write(tmp_path / "a.txt", "one\ntwo\n\nthree\n")
    assert [as_text(r) for r in records(path, unit=unit)] == expected


def test_a_long_text_file_is_cut_at_lines_and_loses_nothing(tmp_path):
    text = "".join(f"line {i}\n  indented\n\n" for i in range(200_000))
    pieces = [as_text(r) for r in records(write(tmp_path / "a.txt", text))]
    assert len(pieces) > 2
    assert "".join(pieces) == text
    assert all(not piece[0].isspace() for piece in pieces)


def test_tables(tmp_path):
    rows = [["A \"quoted\", text", "pos"], ["two\nlines", "neg"]]
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert [list(as_labelled(r)) for r in records(str(tmp_path / "t.csv"))] == rows
    path = write(tmp_path / "t.tsv", 'sentence\tlabel\nsaid " once\t1\n')
    assert [as_labelled(r) for r in records(path)] == [('said " once', "1")]


LONG = [("It was a long and dull film.", "bad"), ("I would see it again.", "good"), ("Too loud", "bad"), ("Fine", "good")]


def table(path, *rows, delimiter=","):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return str(path)


@pytest.mark.parametrize("header, names", [
    (("review", "sentiment"), "review, sentiment, named by the first row"), (("Text", "Label"), "Text, Label, named"),
    (("Review Text", "Overall-Rating"), "Review Text, Overall-Rating, named"), (("文本", "标签"), "文本, 标签, named"),
    (("0", "1"), "0, 1, named"), (None, "2 columns without names, data from the first row on")])
@pytest.mark.parametrize("ending, delimiter", [("csv", ","), ("tsv", "\t"), ("csv", ";"), ("csv", "\t")])
def test_a_header_never_becomes_a_record_and_what_was_taken_is_told(header, names, ending, delimiter, tmp_path, capsys):
    path = table(tmp_path / f"t.{ending}", *([header] if header else []), *LONG, delimiter=delimiter)
    found = records(path)
    assert [tuple(record.fields.values()) for record in found] == LONG
    said = capsys.readouterr().err
    assert names in said and ("separated by" in said) == ((ending, delimiter) not in (("csv", ","), ("tsv", "\t")))
    columns = {} if not header or set(header) & {"Text", "0"} else {"field": header[0], "label_field": header[1].upper()}
    assert [as_labelled(record, **columns) for record in found] == LONG
    if columns:
        with pytest.raises(UserError, match="no text and label; it has .*--field and --label-field"):
            as_labelled(found[0])
        with pytest.raises(UserError, match="no text; it has .*--field"):
            as_text(found[0])
        assert as_text(found[1], header[0].lower()) == LONG[1][0]


@pytest.mark.parametrize("rows, header", [
    ([("name", "word"), ("good", "pos"), ("fine", "neg")], ("name", "word")),             # nothing but the option tells
    ([("3", "7"), ("The first thing.", "a"), ("The second thing.", "b")], ("3", "7"))])
def test_the_option_says_what_the_first_row_is(rows, header, tmp_path):
    path = table(tmp_path / "t.csv", *rows)
    assert [tuple(r.fields.values()) for r in records(path, header="no")] == rows
    named = records(path, header="yes")
    assert [tuple(r.fields.values()) for r in named] == rows[1:] and tuple(named[0].fields) == header


def test_a_column_that_was_asked_for_is_a_name(tmp_path):
    path = table(tmp_path / "t.csv", ("name", "word"), ("good", "pos"), ("fine", "neg"))
    assert [as_text(r, "Name") for r in records(path, wanted=("Name",))] == ["good", "fine"]


def test_tables_of_other_programs(tmp_path):
    rows = [{"id": "0", "text": "say \"yes\"\tnow", "label": "a"}, {"id": "1", "text": "two, or\nthree; lines", "label": "b"}]
    for ending, delimiter in (("csv", ","), ("tsv", "\t"), ("csv", ";")):
        path = tmp_path / f"p.{ending}"
        pandas.DataFrame(rows)[["text", "label"]].to_csv(path, sep=delimiter, lineterminator="\r\n", encoding="utf-8-sig")
        assert [as_labelled(r) for r in records(str(path))] == [(row["text"], row["label"]) for row in rows]
    with_empty = table(tmp_path / "e.csv", ("text", "note", "label"), ("a b", "", "1"), ("", "", ""), ("c d", "", "0"))
    assert [as_labelled(r) for r in records(with_empty)] == [("a b", "1"), ("c d", "0")]


@pytest.mark.parametrize("line, label", [('{"text": "a", "label": 1}', "1"), ('{"Text": "a", "LABEL": 1.0}', "1"),
                                         ('{"sentence": "a", "class": " x "}', "x"), ('{"text": "a", "label": 0}', "0")])
def test_labels_of_json(line, label, tmp_path):
    (record,) = records(write(tmp_path / "a.jsonl", line))
    assert as_labelled(record) == ("a", label)


@pytest.mark.parametrize("line, words", [
    ('{"text": "a", "label": null}', "label is None"), ('{"text": "a", "label": ["x"]}', r"label is \['x'\]"),
    ('{"text": "a", "label": ""}', "label is ''"), ('{"text": " ", "label": "x"}', "text is empty"),
    ('{"text": "a", "id": 5}', "no text and label; it has text, id"), ('{"text": 3, "label": "x"}', "no text under 'text'")])
def test_labels_that_are_none(line, words, tmp_path):
    (record,) = records(write(tmp_path / "a.jsonl", line))
    with pytest.raises(UserError, match="a.jsonl:1: .*" + words):
        as_labelled(record)


def test_a_record_without_the_field_is_named(tmp_path):
    first, second = records(write(tmp_path / "a.jsonl", '{"text": "a"}\n{"title": "b"}\n'))
    assert as_text(first) == "a"
    with pytest.raises(UserError, match="a.jsonl:2: no text; it has title"):
        as_text(second)
    with pytest.raises(UserError, match="a.jsonl:2: no text under 'text', which --field asks for; it has title"):
        as_text(second, "text")


def test_conll(tmp_path):
    path = write(tmp_path / "t.conll", "EU NNP B-ORG\nrejects VBZ O\n\t\nPeter NNP B-PER\n")
    assert [r.fields for r in records(path)] == [{"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
                                                 {"tokens": ["Peter"], "tags": ["B-PER"]}]


@pytest.mark.parametrize("item", [
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"messages": [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}]},
    {"conversations": [{"from": "human", "value": "Add\n\n1 2"}, {"from": "gpt", "value": "3"}]},
    {"prompt": "Add\n\n1 2", "completion": "3"},
    {"context": "Add", "question": "1 2", "answers": ["3"]},
])
def test_every_chat_layout_is_one_exchange(tmp_path, item):
    expected = [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}]
    assert [as_messages(r) for r in records(write(tmp_path / "a.jsonl", json.dumps(item) + "\n"))] == [expected]
    assert [as_messages(r) for r in records(write(tmp_path / "a.json", json.dumps([item])))] == [expected]


def test_contents_in_parts_are_texts(tmp_path):
    parts = [{"type": "text", "text": "Add "}, {"type": "text", "text": "1"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "2"}]
    record, image = records(write(tmp_path / "a.jsonl", "\n".join(json.dumps({"messages": m}) for m in (
        messages, [{"role": "user", "content": [*parts, {"type": "image"}]}, messages[1]]))))
    assert as_messages(record) == messages and as_text(record) == "Add 1\n2"
    with pytest.raises(UserError, match="must be texts"):
        as_messages(image)


def test_folder_and_glob_find_the_same_files_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt", "image.png"):
        write(tmp_path / name, name)
    expected = [str(tmp_path / n) for n in ("a.txt", "b.txt", "deep/c.txt")]
    assert find_sources([tmp_path]) == expected
    assert find_sources([str(tmp_path / "**/*.txt")]) == expected


def test_huggingface_dataset_reads_as_its_records(tmp_path):
    datasets = pytest.importorskip("datasets")
    items = [{"text": "one"}, {"text": "two"}]
    datasets.Dataset.from_list(items).save_to_disk(tmp_path / "saved")
    source = f"hf:{tmp_path / 'saved'}"
    assert [as_text(r) for r in records(source)] == ["one", "two"]
    before = source_digest(source)
    datasets.Dataset.from_list(items[:1]).save_to_disk(tmp_path / "other")
    assert source_digest(f"hf:{tmp_path / 'other'}") != before


@pytest.mark.parametrize("name, content, message", [
    ("empty.txt", "", "holds no records"),
    ("empty.json", "", "holds no records"),
    ("binary.txt", b"abc\0def", "NUL byte"),
    ("latin1.txt", "café\n".encode("latin-1"), "not UTF-8 .*column 4"),
    ("uneven.tsv", "a\t1\nb\n", ":2: 1 columns where the file began with 2"),
    ("uneven.csv", "a,1\nb,2,3\n", ":2: 3 columns where the file began with 2"),
    ("twice.csv", "text,Label,label\na,b,c\n", ":1: two columns are named 'Label'"),
    ("joined.csv", "text,label\na,b\ntext,label\n", ":3: the names of the columns again"),
    ("unclear.csv", "good,pos\nbad,neg\n", "good, pos, may be names of columns or data: say --header yes or no"),
    ("quotes.csv", 'text,label\n"a,b\n', "quotes.csv:2: unexpected end of data"),
    ("more.csv", "text,label,\na,b\n", ":2: 2 columns where the file began with 3"),
    ("uneven.conll", "EU B-ORG\nrejects\n", ":2: 1 columns"),
    ("broken.jsonl", '{"text": "a"}\n{"text": \n', ":2: not JSON"),
    ("list.jsonl", "[1]\n", "must be a JSON object"),
    ("squad.json", '{"data": [{"paragraphs": [{"qas": [{"id": "1"}]}]}]}', "not SQuAD's layout"),
    ("data.parquet", "x", "unknown format"),
])
def test_bad_files_are_refused_with_their_place(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as refused:
        records(write(tmp_path / name, content))
    assert name in str(refused.value)


@pytest.mark.parametrize("fields, view, message", [
    ({"a": 1}, as_messages, "not a chat or instruction record"),
    ({"messages": [{"role": "user", "content": "hi"}]}, as_messages, "end with the assistant's reply"),
    ({"text": "only text"}, as_labelled, "no text and label"),
])
def test_records_of_another_kind_are_refused(tmp_path, fields, view, message):
    (record,) = records(write(tmp_path / "a.jsonl", json.dumps(fields)))
    with pytest.raises(UserError, match=message):
        view(record)


def test_nothing_found_is_refused(tmp_path):
    with pytest.raises(UserError, match="no data file there"):
        find_sources([tmp_path / "missing*.txt"])


def test_normalize():
    assert normalize("cafe\u0301 \r\nx\x07y\t\n") == "café\nxy\n"


def test_clean_counts_each_reason():
    from collections import Counter
    counts = Counter()
    texts = ["good text here", "good text here", "short", "  \n", "x" * 50, "это совсем другой язык"]
    options = DataOptions(data=(), min_chars=6, max_chars=40, languages=("en", "zh"), deduplicate=True)
    kept = list(clean(texts + ["the cat is on the mat", "这是一个中文句子"], options, counts))
    assert kept == ["the cat is on the mat", "这是一个中文句子"]
    assert counts == {"kept": 2, "too short": 1, "empty": 1, "too long": 1, "other language": 3}
    counts.clear()
    assert list(clean(["a b", "c", "a b"], DataOptions(data=(), deduplicate=True), counts)) == ["a b", "c"]
    assert counts["repeated"] == 1


def test_language_of_real_text(shared_data):
    assert language_of((shared_data / "text/wikitext2-valid.txt").read_text()[:3000]) == "en"
    assert language_of((shared_data / "text/debian-reference-zh.txt").read_text()[2000:6000]) == "zh"
    assert language_of("Der Hund ist nicht im Haus und die Katze auch nicht") == "de"
    assert language_of("Le chat est dans la maison avec les chiens") == "fr"
    assert language_of("これは日本語の文章です") == "ja"
    assert language_of("12345 !") is None


def test_unknown_language_is_refused():
    with pytest.raises(UserError, match="tlh"):
        DataOptions(data=(), languages=("tlh",))
