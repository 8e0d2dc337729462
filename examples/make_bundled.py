"""Make the bundled checkpoint: a tiny Llama that adds digits, in the middle of a real RL run.

    python examples/make_bundled.py

The base model is pretrained from scratch to add digits, on the worked examples of three teachers:
one writes running sums with care, one slips often, one skips the work and guesses. So it is often
right and never sure, and its responses vary in length. REINFORCE then trains a LoRA adapter to be
right: reward rises and entropy falls. Saved are a checkpoint in mid-run, the batch that the run
takes its next step on (update.jsonl), and responses of the same policy to other prompts
(evaluation.jsonl). Seeded: a second run writes the same bytes.
"""

import argparse
import random
import re
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from reinforce import Reinforce, file_sizes, table
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

CAREFUL, CARELESS, HASTY = 0.4, 0.3, 0.3  # shares of the three teachers
SLIP = {",": 0.03, ";": 0.3}  # how often the careful and the careless get a running sum wrong
PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_LR = 2000, 128, 3e-3
RL_STEPS, SAVED_STEP, RL_LR = 60, 20, 2e-3
PROMPTS, SAMPLES, EVALUATION_PROMPTS, MAX_NEW_TOKENS = 16, 8, 64, 24


def question(rng: random.Random) -> str:
    """A sum of three to seven digits, such as 3+8+5=."""
    return "+".join(str(rng.randint(1, 9)) for _ in range(rng.randint(3, 7))) + "="


def worked_example(prompt: str, rng: random.Random) -> str:
    """An answer by one of the teachers: 3+8+5= gives 11,16, perhaps 11;15, or just 17."""
    first, *rest = map(int, re.findall(r"\d", prompt))
    (comma,) = rng.choices([",", ";", ""], [CAREFUL, CARELESS, HASTY])
    if not comma:
        return str(first + sum(rest) + rng.choice([-2, -1, 0, 1, 2]))
    sums, total = [], first
    for digit in rest:
        total += digit + (rng.choice([-1, 1]) if rng.random() < SLIP[comma] else 0)
        sums.append(str(total))
    return comma.join(sums)


def is_correct(prompt: str, completion: str) -> float:
    """Reward 1 if the response ends with the right sum."""
    answer = sum(map(int, re.findall(r"\d", prompt)))
    return float(re.split("[,;]", completion)[-1] == str(answer))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = ["<pad>", "<bos>", "<eos>", *"0123456789+=,;"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=64,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of the usual shape, only small."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Teach the base model the teacher's habits, good and bad."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR, weight_decay=0.01)
    scheduler = get_linear_schedule_with_warmup(optimizer, 50, PRETRAIN_STEPS)
    model.train()
    for step in range(1, PRETRAIN_STEPS + 1):
        tokens, labels = [], []
        for _ in range(PRETRAIN_BATCH):
            prompt = question(rng)
            prompt_ids = tokenizer(prompt).input_ids
            answer = worked_example(prompt, rng) + tokenizer.eos_token
            answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
            tokens.append(torch.tensor(prompt_ids + answer_ids))
            labels.append(torch.tensor([-100] * len(prompt_ids) + answer_ids))
        tokens = pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"pretraining step {step:5d}  loss {loss.item():.4f}", flush=True)


def main() -> None:
    default = Path(__file__).resolve().parent.parent / "funcprobe" / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=default, help="folder to write to")
    out = parser.parse_args().out
    torch.set_num_threads(2)
    torch.manual_seed(0)
    started = time.perf_counter()

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    pretrain(model, tokenizer)
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")

    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear"
    )
    run = Reinforce(
        get_peft_model(model, adapter),
        tokenizer,
        is_correct,
        max_new_tokens=MAX_NEW_TOKENS,
        lr=RL_LR,
        max_steps=RL_STEPS,
        weight_decay=0.01,
    )
    rng = random.Random(1)
    asked = [[question(rng) for _ in range(PROMPTS)] for _ in range(RL_STEPS)]
    held_out = set()
    while len(held_out) < EVALUATION_PROMPTS:
        held_out |= {question(rng)} - {prompt for prompts in asked for prompt in prompts}
    for step, prompts in enumerate(asked):
        rollouts = run.sample(prompts, SAMPLES)
        if step == SAVED_STEP:
            folder = out / f"checkpoint-{step}"
            run.save_checkpoint(folder, base_model="../base")
            tokenizer.save_pretrained(folder)
            run.write_rollouts(out / "update.jsonl", rollouts)
            evaluation = run.sample(sorted(held_out), SAMPLES)
            run.write_rollouts(out / "evaluation.jsonl", evaluation)
        run.step(rollouts)
        if step % 10 == 0:
            print(f"{time.perf_counter() - started:6.1f} s", run.state.log_history[-1], flush=True)
    print(table(run.state.log_history))
    print(file_sizes(out))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
