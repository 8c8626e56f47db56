"""lm-evaluation-harness tasks: the adapter gives what the harness's own Hugging Face model gives on the same weights."""

import json

import pytest

lm_eval = pytest.importorskip("lm_eval")

CHOICE = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [" yes", " no it is not"]
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
GENERATE = """task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"text": f"the small engine reads sentence {i} and", "label": i % 2} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("generate", GENERATE)):
        (folder / f"{name}.yaml").write_text(text.format(data=tmp_path / "data.jsonl"))
    return folder


def test_equal_to_the_harness(tasks, tiny_checkpoint):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from models.judging.language_model import open_model
    from models.lm_eval_adapter import EdgewrightLM
    folder = tiny_checkpoint("smollm2")
    manager = TaskManager(include_path=str(tasks))
    names = ["tiny_choice", "tiny_rolling", "tiny_generate"]
    run = lambda model: lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True)
    ours = run(EdgewrightLM(open_model(folder, threads=1), progress=False))
    theirs = run(HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1))
    for name in names:
        for a, b in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            for x, y in zip(a["resps"], b["resps"], strict=True):
                assert [pytest.approx(v, abs=1e-3) if isinstance(v, float) else v for v in _flat(y)] == list(_flat(x))
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)


def _flat(value):
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def test_command_and_unknown_task(tasks, tiny_checkpoint, tmp_path, capsys):
    from models import lm_eval_adapter
    folder = str(tiny_checkpoint("smollm2"))
    assert lm_eval_adapter.main([folder, "--tasks", "tiny_choice", "--include-path", str(tasks), "--limit", "3",
                                 "--json", str(tmp_path / "out.json")]) == 0
    assert "acc,none" in json.loads((tmp_path / "out.json").read_text())["tiny_choice"]
    assert lm_eval_adapter.main([folder, "--tasks", "tiny_chioce", "--include-path", str(tasks)]) == 2
    assert "no task 'tiny_chioce'" in capsys.readouterr().err


def test_data_that_cannot_be_reached(tasks, tiny_checkpoint, monkeypatch, capsys):
    import huggingface_hub.constants
    from models import lm_eval_adapter
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tasks / "hub.yaml").write_text(CHOICE.replace("dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}",
                                                   "dataset_path: nobody/nothing").replace("tiny_choice", "tiny_hub")
                                    .replace("{{", "{").replace("}}", "}"))
    assert lm_eval_adapter.main([str(tiny_checkpoint("smollm2")), "--tasks", "tiny_hub", "--include-path", str(tasks)]) == 2
    assert "cannot be reached" in capsys.readouterr().err
