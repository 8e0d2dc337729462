"""Plain REINFORCE with group baselines: PyTorch, transformers and PEFT, no Trainer.

One step samples a group of responses to each prompt, rewards them, subtracts the group's mean
reward and takes one AdamW step. Checkpoints are laid out as the Hugging Face Trainer and TRL lay
them out, so whatever reads theirs reads these.
"""

import json
import re
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, TrainerState, get_linear_schedule_with_warmup

# The names that the Trainer excludes from weight decay.
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


class Rollout(NamedTuple):
    """One sampled response."""

    prompt: str
    completion: str
    prompt_ids: list[int]
    completion_ids: list[int]  # the first EOS, where one was sampled, is the last of them
    reward: float
    group: int  # index of the prompt in its batch


class Scored(NamedTuple):
    """What the policy makes of the responses to one prompt, each [n, R] in nats."""

    logp: Tensor
    entropy: Tensor
    mask: Tensor


class Reinforce:
    """A policy, its optimizer and scheduler, and the log of its steps."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        reward: Callable[[str, str], float],
        *,
        max_new_tokens: int,
        lr: float,
        max_steps: int,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ):
        self.model, self.tokenizer, self.reward = model.eval(), tokenizer, reward
        self.max_new_tokens, self.max_grad_norm = max_new_tokens, max_grad_norm
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        decay = [p for name, p in trained if not NO_DECAY.search(name.lower())]
        no_decay = [p for name, p in trained if NO_DECAY.search(name.lower())]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decay, "weight_decay": weight_decay},
                {"params": no_decay, "weight_decay": 0.0},
            ],
            lr=lr,
        )
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, 0, max_steps)
        self.state = TrainerState(max_steps=max_steps, logging_steps=1)

    @torch.no_grad()
    def sample(self, prompts: list[str], samples: int) -> list[Rollout]:
        """Draw `samples` responses to each prompt from the policy itself, undistorted."""
        tokenizer = self.tokenizer
        prompt_ids = [tokenizer(prompt).input_ids for prompt in prompts]
        inputs = tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt")
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=samples,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        tokens = self.model.generate(**inputs, generation_config=config)
        completions = tokens[:, inputs["input_ids"].shape[1] :].tolist()
        rollouts = []
        for row, ids in enumerate(completions):
            group = row // samples
            if tokenizer.eos_token_id in ids:
                ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            reward = self.reward(prompts[group], text)
            rollouts.append(Rollout(prompts[group], text, prompt_ids[group], ids, reward, group))
        return rollouts

    def score(self, group: list[Rollout]) -> Scored:
        """Score responses that share a prompt: only their ends are padded, on the right."""
        completion = pad_sequence([torch.tensor(r.completion_ids) for r in group], batch_first=True)
        length = torch.tensor([len(r.completion_ids) for r in group])
        mask = torch.arange(completion.shape[1]) < length[:, None]
        prompt = torch.tensor(group[0].prompt_ids).expand(len(group), -1)
        output = self.model(
            input_ids=torch.cat([prompt, completion], dim=1),
            attention_mask=torch.cat([torch.ones_like(prompt), mask.long()], dim=1),
            logits_to_keep=completion.shape[1] + 1,
        )
        logp = output.logits[:, :-1].float().log_softmax(-1)
        chosen = logp.gather(-1, completion[..., None]).squeeze(-1)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1)
        return Scored(chosen, entropy, mask)

    def step(self, rollouts: list[Rollout]) -> dict[str, float]:
        """Take one AdamW step on the policy gradient of `rollouts`, and log it."""
        scale = 1 / (len(rollouts) * self.max_new_tokens)
        entropy = tokens = 0.0
        for group in groups(rollouts):
            reward = torch.tensor([r.reward for r in group])
            advantage = reward - reward.mean()
            scored = self.score(group)
            loss = -scale * (advantage[:, None] * scored.logp)[scored.mask].sum()
            loss.backward()
            entropy += scored.entropy[scored.mask].sum().item()
            tokens += scored.mask.sum().item()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm).item()
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1
        log = {
            "step": self.state.global_step,
            "reward": sum(r.reward for r in rollouts) / len(rollouts),
            "entropy": entropy / tokens,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "completions/mean_length": tokens / len(rollouts),
        }
        self.state.log_history.append(log)
        return log

    def save_checkpoint(self, folder: Path, base_model: str) -> None:
        """Save what the Trainer saves: the adapter, optimizer, scheduler and trainer state."""
        config = self.model.peft_config["default"]
        config.base_model_name_or_path = base_model
        config.target_modules = sorted(config.target_modules)  # a set has no order of its own
        self.model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink()  # PEFT's empty model card
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        torch.save(self.scheduler.state_dict(), folder / "scheduler.pt")
        self.state.save_to_json(str(folder / "trainer_state.json"))

    @torch.no_grad()
    def write_rollouts(self, path: Path, rollouts: list[Rollout]) -> None:
        """Write one JSON row a response, with its tokens' log-probabilities at this policy."""
        with path.open("w", encoding="utf-8") as file:
            for group in groups(rollouts):
                logp = self.score(group).logp
                for rollout, row in zip(group, logp, strict=True):
                    old_logp = row[: len(rollout.completion_ids)].tolist()
                    record = rollout._asdict() | {
                        "old_logp": [float(f"{x:.7g}") for x in old_logp],
                        "sampling": {"temperature": 1.0, "top_p": 1.0},
                    }
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def groups(rollouts: list[Rollout]) -> list[list[Rollout]]:
    """Cut a batch into runs of responses to the same prompt."""
    return [list(group) for _, group in groupby(rollouts, key=lambda r: r.group)]


def table(log_history: Iterable[dict[str, float]]) -> str:
    """The run as text."""
    lines = [f"{'step':>4} {'reward':>7} {'entropy':>8} {'lr':>9} {'grad_norm':>9} {'tokens':>6}"]
    for log in log_history:
        lines.append(
            f"{log['step']:4d} {log['reward']:7.3f} {log['entropy']:8.4f} "
            f"{log['learning_rate']:9.2e} {log['grad_norm']:9.4f} "
            f"{log['completions/mean_length']:6.1f}"
        )
    return "\n".join(lines)


def file_sizes(folder: Path) -> str:
    """Every file below `folder` with its size, and their total."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{path.stat().st_size:10,} {path.relative_to(folder)}" for path in files]
    total = sum(path.stat().st_size for path in files)
    return "\n".join([*lines, f"{total:10,} in all"])
