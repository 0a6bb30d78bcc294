#!/usr/bin/env python3
"""lm-eval end to end against `tandem serve` with tandem-tiny: a log-likelihood task and a generation task over data made
here, through /v1/completions and /v1/chat/completions. Nothing is downloaded.

Expected: every answer right, since the model was made to know these facts, and the scores that the server's own
log-probabilities give.
"""
import json
import math
import os
import pathlib
import sys
import tempfile

os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))
from serving import Server  # noqa: E402

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

CHOICES = ["Paris", "Berlin", "Madrid", "Rome"]
FACTS = {"France": 0, "Germany": 1, "Spain": 2, "Italy": 3}
LIKELIHOOD = """
task: tandem_capitals
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATION = """
task: tandem_questions
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "What is the capital of {{country}}?"
doc_to_target: "The capital of {{country}} is {{choices[answer]}}."
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 40, temperature: 0%s}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def evaluate(model, url, task, folder, **more):
    arguments = {"model": "tandem-tiny", "base_url": url, "num_concurrent": 4, "max_retries": 1, "max_length": 2048}
    return lm_eval.simple_evaluate(model=model, model_args=arguments, tasks=[task], task_manager=TaskManager(include_path=folder),
                                   log_samples=True, bootstrap_iters=0, **more)


def main():
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder, "facts.jsonl")
        data.write_text("".join(json.dumps({"country": c, "choices": CHOICES, "answer": a}) + "\n" for c, a in FACTS.items()))
        pathlib.Path(folder, "capitals.yaml").write_text(LIKELIHOOD % data)
        pathlib.Path(folder, "questions.yaml").write_text(GENERATION % (data, ', chat_template_kwargs: {enable_thinking: false}'))
        server = Server("--device", "cpu")
        try:
            done = evaluate("local-completions", server.url + "/v1/completions", "tandem_capitals", folder)
            print(json.dumps(done["results"], indent=1, default=str))
            right, n = 0, 0
            for sample in done["samples"]["tandem_capitals"]:
                country, scores = sample["doc"]["country"], [r[0] for r in sample["filtered_resps"]]
                for choice, score in zip(CHOICES, scores):
                    n_context = server.post("/tokenize", {"prompt": f"The capital of {country} is"})["count"]
                    echo = server.post("/v1/completions", {"prompt": f"The capital of {country} is {choice}", "max_tokens": 0, "echo": True,
                                                           "logprobs": 1})["choices"][0]["logprobs"]["token_logprobs"]
                    assert math.isclose(sum(echo[n_context:]), score, rel_tol=1e-9), (country, choice, score)
                    n += 1
                right += scores.index(max(scores)) == sample["doc"]["answer"]
            assert n == 16 and done["results"]["tandem_capitals"]["acc,none"] == right / 4
            done = evaluate("local-chat-completions", server.url + "/v1/chat/completions", "tandem_questions", folder, apply_chat_template=True)
            print(json.dumps(done["results"], indent=1, default=str))
            answers = {s["doc"]["country"]: s["resps"][0][0] for s in done["samples"]["tandem_questions"]}
            print(answers)
            assert answers["France"] == "The capital of France is Paris."
            expected = sum(answers[c] == f"The capital of {c} is {CHOICES[a]}." for c, a in FACTS.items()) / len(FACTS)
            assert done["results"]["tandem_questions"]["exact_match,none"] == expected
        finally:
            assert server.stop() == 0
    print("lm-eval: 2 tasks, 20 requests: ok")


if __name__ == "__main__":
    main()
