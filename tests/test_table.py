"""Tables as texts: columns of the files that people have, chats in them, and what a user reads when a row is none."""

import gzip
import json
from pathlib import Path

import pandas
import pytest

from eora_lab.cli import main
from eora_lab.errors import EoraLabError
from eora_lab.experiment.cells import Cell
from eora_lab.experiment.identity import Identities
from eora_lab.text.read import text_digest
from eora_lab.text.settings import Calibration
from eora_lab.text.tokens import calibration_batches, token_windows
from tests.tiny import begins_texts, tiny_model, tiny_tokenizer

TOKENIZER, MODEL = tiny_tokenizer(), tiny_model("llama")
ROWS = [{"id": i, "text": text} for i, text in enumerate(["The fox 007", "NA", 'jumps, "over"\nthe dog.'])]
TEXT = "\n\n".join(row["text"] for row in ROWS)
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(name: str, rows: list[dict] = ROWS) -> str:
    """A table in the form that its name says."""
    kind = Path(name.removesuffix(".gz")).suffix
    if kind == ".parquet":
        pandas.DataFrame(rows).to_parquet(name)
    elif kind in (".csv", ".tsv"):
        pandas.DataFrame(rows).to_csv(name, index=False, sep="\t" if kind == ".tsv" else ",")
    else:
        content = (json.dumps(rows, indent=1) if kind == ".json" else lines(rows)).encode()
        Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return name


def whole(source: str, tokenizer=TOKENIZER) -> str:
    """All text of a source, a character a token."""
    return "".join(tokenizer.batch_decode(token_windows(tokenizer, source, seqlen=1)))


FORMS = ["d.jsonl", "d.ndjson", "d.json", "d.csv", "d.tsv", "d.parquet", "d.jsonl.gz", "d.json.gz", "d.csv.gz", "d.txt"]


@pytest.mark.parametrize("name", FORMS)
def test_a_column_is_the_text_of_its_rows(name):
    assert whole(f"{write(name)}:text") == TEXT
    assert calibration_batches(TOKENIZER, f"{name}:text", 4, 8).shape == (4, 8)


@pytest.mark.parametrize("name", FORMS)
def test_a_table_without_a_column_is_refused_with_those_it_has(name):
    write(name)
    for read in (lambda: calibration_batches(TOKENIZER, name, 1, 4), lambda: text_digest(name)):
        with pytest.raises(EoraLabError, match=f"{name} is a table of the columns id, text: .*such as {name}:text$"):
            read()
    with pytest.raises(EoraLabError, match=f"{name} has no column 'txt'; it has the columns id, text"):
        whole(f"{name}:txt")


def test_lines_of_json_may_hold_what_ends_lines_elsewhere():
    Path("d.jsonl").write_text('{"text": "one\u2028two"}\r\n\r\n{"text": "three"}', encoding="utf-8")
    assert whole("d.jsonl:text") == "one<unk>two\n\nthree"
    Path("d.json").write_text(lines(ROWS))  # lines under the name of the other form
    assert whole("d.json:text") == TEXT


@pytest.mark.parametrize("text", ["{a set} of words", "[1] A note.\n[2] More.", "[1, 2]", '{"a": 1}\nis an object.'])
def test_prose_stays_text(text):
    Path("t.txt").write_text(text)
    assert whole("t.txt") == text
    Path("t.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert whole("t.txt.gz") == text
    with pytest.raises(EoraLabError, match=r"t.txt is plain text, which has no columns"):
        whole("t.txt:text")


def test_a_file_of_the_whole_name_comes_first():
    write("d.jsonl")
    Path("d.jsonl:text").write_text("another file")
    assert whole("d.jsonl:text") == "another file"
    Path("a:b.jsonl").write_text(lines([{"c:d": "x"}]))
    assert whole("a:b.jsonl:c:d") == "x"


def test_columns_mix_with_other_sources():
    write("a+b.jsonl", [{"text": "a" * 40}])
    Path("c.csv").write_text("text\n" + "c" * 40)
    assert set(whole("a+b.jsonl:text")) == {"a"}
    write("a.jsonl", [{"text": "a" * 40}])
    texts = TOKENIZER.batch_decode(calibration_batches(TOKENIZER, "a.jsonl:text+c.csv:text+pydoc", 6, 8))
    assert texts.count("a" * 8) == 3 and "c" * 8 in texts
    with pytest.raises(EoraLabError, match=r"unknown source 'absent.csv:text'.*file:column"):
        calibration_batches(TOKENIZER, "a.jsonl:text+absent.csv:text", 6, 8)


# --- rows that are no text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "text is null"),
        (7, "text is 7, not text"),
        (["a"], "text is a list that is no chat of role and content"),
        ([{"from": "human", "value": "Why?"}], "text is a list that is no chat"),
        ({"a": 1}, "not text"),
        ("\ud800", "lone surrogate"),
        (json.dumps(CHAT), "a chat written as text"),
        (str(CHAT), "a chat written as text"),
    ],
)
def test_a_row_that_is_no_text_is_named(value, message):
    Path("d.jsonl").write_text(lines([*ROWS, {"text": value}]))
    with pytest.raises(EoraLabError, match=f"^row 4 of d.jsonl: .*{message}"):
        whole("d.jsonl:text")


def test_null_in_other_forms():
    write("d.parquet", [{"text": "a"}, {"text": None}])
    with pytest.raises(EoraLabError, match=r"row 2 of d.parquet: text is null"):
        whole("d.parquet:text")
    write("d.jsonl", [{"text": "a"}, {"other": "b"}])
    with pytest.raises(EoraLabError, match=r"row 2 of d.jsonl: text is null"):
        whole("d.jsonl:text")


def test_blank_rows_are_left_out_with_a_word():
    for name in ("d.jsonl", "d.csv", "d.parquet"):
        write(name, [{"id": 1, "text": "one"}, {"id": 2, "text": ""}, {"id": 3, "text": "two"}])
        with pytest.warns(UserWarning, match=rf"{name}: 1 rows are blank in text \(the first is row 2\)"):
            assert whole(f"{name}:text") == "one\n\ntwo"
    write("d.jsonl", [{"text": " "}])
    with pytest.warns(UserWarning), pytest.raises(EoraLabError, match=r"d.jsonl:text holds no text"):
        whole("d.jsonl:text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"text": "a"}\n{"text": "b', "line 2 of d.jsonl is no JSON"),
        ("d.jsonl", b'{"text": "a"}\n["b"]', "row 2 of d.jsonl is no object with columns"),
        ("d.json", b'[{"text": "a"}, {"te', "d.json is no JSON"),
        ("d.json", b"[" * 100_000, "d.json is no JSON"),
        ("d.json", b'["a", "b"]', "row 1 of d.json is no object with columns"),
        ("d.jsonl", b'{"text": "caf\xe9"}', "not UTF-8 text"),
        ("d.csv", b"text,id\na,1\nb,2,3\n", "cannot read d.csv as a table: .*line 3"),
        ("d.csv", b"text\na,1\nb,2\n", "more fields than its first line has names"),
        ("d.csv", b"", "no column 'text'"),
        ("d.jsonl", b"", "no column 'text'"),
        ("d.parquet", b"PAR1 and no more", "cannot read d.parquet: .*fetch it again"),
        ("d.parquet", b"no parquet", "cannot read d.parquet: .*fetch it again"),
        ("d.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-9], "cannot unpack d.jsonl.gz"),
    ],
)
def test_damaged_tables(name, content, message):
    Path(name).write_bytes(content)
    with pytest.raises(EoraLabError, match=message) as error:
        whole(f"{name}:text")
    assert "\n" not in str(error.value)


def test_a_table_without_rows_is_no_text():
    Path("d.csv").write_text("")
    with pytest.raises(EoraLabError, match=r"d.csv is a table without rows"):
        whole("d.csv")


# --- chats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.parquet"])
def test_chats_go_through_the_template(name):
    write(name, [{"messages": CHAT}, {"messages": CHAT[:1]}])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    first, second = "<bos>user: Why?\nassistant: So.\n", "<bos>user: Why?\n"
    assert whole(f"{name}:messages", tokenizer) == first + second
    (drawn,) = tokenizer.batch_decode(calibration_batches(tokenizer, f"{name}:messages", 1, 10))
    assert drawn == "<bos>user: Why"  # a sequence begins with a chat
    begun = begins_texts(tokenizer)
    drawn = calibration_batches(begun, f"{name}:messages", 1, 10)
    assert (drawn == begun.bos_token_id).sum() == 1 and drawn[0, 0] == begun.bos_token_id


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "tokenizer has no chat template"),
        ("{{ raise_exception('no system role') }}", "chat template fails on this chat: no system role"),
        ("{% for m in messages %}", "chat template fails on this chat"),
        ("{{ 1 / 0 }}", "chat template fails on this chat: division by zero"),
        (" ", "chat template makes nothing of this chat"),
    ],
)
def test_a_template_that_fails_is_one_line(template, message):
    write("d.jsonl", [{"conversations": CHAT}])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(EoraLabError, match=f"^row 1 of d.jsonl: .*{message}") as error:
        whole("d.jsonl:conversations", tokenizer)
    assert "\n" not in str(error.value)


# --- settings, identity, commands -----------------------------------------------------------------------------------


def test_a_column_may_be_a_setting_of_its_own():
    write("d.jsonl")
    named = Calibration("d.jsonl:text", nsamples=2, seqlen=8).batches(MODEL, TOKENIZER)
    for first in (False, True):
        apart = Calibration("d.jsonl", nsamples=2, seqlen=8, column="text", first=first).batches(MODEL, TOKENIZER)
        assert apart.equal(named) == (not first)
    with pytest.raises(EoraLabError, match="the column is 'text', but pydoc names no file without a column"):
        Calibration("pydoc", column="text").batches(MODEL, TOKENIZER)
    assert "column" not in Cell().config()  # and so the cells that there are keep their names
    cell = Cell.from_config({"source": "d.jsonl", "column": "text"})
    assert Cell.from_config(cell.config()) == cell and cell.config()["column"] == "text"


def test_the_digest_is_that_of_the_column():
    rows = [{"a": "one", "b": "two", "messages": CHAT}]
    write("d.jsonl", rows)
    digests = [text_digest(f"d.jsonl:{column}") for column in ("a", "b", "messages")]
    assert len(set(digests)) == 3
    identities = Identities()
    sources = ["d.jsonl:a", "d.jsonl:messages", "d.jsonl:a+pydoc"]
    cells = [Cell.from_config({"source": source, "perplexity": []}) for source in sources]
    cells.append(Cell.from_config({"source": "d.jsonl", "column": "b", "perplexity": []}))
    before = [identities.of(cell)["texts"] for cell in cells]
    assert before[3] == {"d.jsonl:b": digests[1]}
    write("d.jsonl", [{"a": "three", "b": "four", "messages": CHAT[:1]}])
    after = [identities.of(cell)["texts"] for cell in cells]
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_commands_take_columns(workplace, capsys):
    write("d.jsonl", [{"words": f"The quick brown fox {i} jumps over the lazy dog. " * 3} for i in range(20)])
    evaluation = ["--windows", "2", "--window-length", "32", "--perplexity"]
    assert main(["evaluate", "model", *evaluation, "d.jsonl:words"]) == 0
    assert "tokens of d.jsonl:words" in capsys.readouterr().out
    assert main(["evaluate", "model", *evaluation, "d.jsonl"]) == 1
    assert "such as d.jsonl:words" in capsys.readouterr().err
    small = "--model model --group-size 32 --rank 4 --no-evaluate --calibration.nsamples 2 --calibration.seqlen 32"
    source = ["--calibration.source", "d.jsonl", "--calibration.column", "words"]
    assert main(["compress", "run", *small.split(), *source]) == 0
    settings = json.loads(Path("run/config.json").read_text())["settings"]
    assert (settings["source"], settings["column"]) == ("d.jsonl", "words")
