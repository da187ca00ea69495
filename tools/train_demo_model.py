"""Train the bundled model: ``python tools/train_demo_model.py TEXTS --output DIR``.

A Llama of under two million parameters learns book text, and to recall facts that were stated hundreds of tokens
before. It starts with a rough ability to copy and first learns to copy well, on repeated random tokens. Without that,
it does not learn recall in a short training.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from demo_data import Sample, Source, read_books, train_tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 1024
DISTANCES = [64, 128, 256, 512, 768]
WARM_UP_LENGTHS = [64, 128]
WARM_UP_TOKENS = 2048
COPIED = 0.3  # loss on repeats, in nats, at which copying is learned
SHORT_LENGTHS = [64, 128, 256]
LENGTHS = [128, 256, 512, 256, 1024]
SHORT = 0.35  # share of the training on short sequences only, which contain more questions


def build(vocabulary: int) -> LlamaForCausalLM:
    """Return the untrained model: 4 layers, 8 query heads of size 40 over 4 key/value heads."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=40,
        max_position_embeddings=CONTEXT,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.05)
    return model


@torch.no_grad()
def head_start(
    model: LlamaForCausalLM, back: float = 9.0, write: float = 0.2, match: float = 3.0, say: float = 0.4
) -> None:
    """Let training start with a rough ability to copy, which a short training does not reliably find by itself.

    The first key/value head of layer 0 attends to the previous token and adds a projection of it to the stream. Two
    key/value heads of layer 1 attend to the token that followed an earlier occurrence of the present one, and add
    that token to the prediction. All of these are ordinary weights, which training then changes like any other.
    """
    config = model.config
    dim, sharing = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    basis = torch.linalg.qr(torch.randn(config.hidden_size, 4 * dim)).Q.T.split(dim)  # 4 x [D, hidden]
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    # Rotary embedding turns biases by their position: a query bias turned one step back fits the key before it.
    angles = model.model.rotary_emb.inv_freq[:8]
    first.k_proj.bias[:8] = back
    for head in range(sharing):
        first.q_proj.bias[head * dim : head * dim + 8] = back * angles.cos()
        first.q_proj.bias[head * dim + dim // 2 : head * dim + dim // 2 + 8] = -back * angles.sin()
    first.v_proj.weight[:dim] = basis[0]
    first.o_proj.weight[:, :dim] = write * basis[1].T
    # Slow rotations only, so that a match counts at any distance.
    slow = (torch.arange(dim) % (dim // 2) >= 8)[:, None]
    for head in range(2 * sharing):
        second.q_proj.weight[head * dim : (head + 1) * dim] = match * basis[0] * slow
        second.o_proj.weight[:, head * dim : (head + 1) * dim] = say / sharing * basis[2 + head // sharing].T
    for group in range(2):
        second.k_proj.weight[group * dim : (group + 1) * dim] = match * basis[1] * slow
        second.v_proj.weight[group * dim : (group + 1) * dim] = basis[2 + group]


def batch(source: Source, warm: bool, length: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and loss weights, ``[tokens / length, length]``."""
    samples: list[Sample] = []
    for _ in range(max(1, tokens // length)):
        pick = source.random.random()
        if warm:
            samples.append(source.repeats(length))
        elif pick < 0.35:
            samples.append(source.book(length))
        elif pick < 0.85:
            samples.append(source.episode(length))
        elif pick < 0.93:
            samples.append(source.repeated_text(length))
        else:
            samples.append(source.repeats(length))
    ids = torch.tensor([sample.ids for sample in samples])
    return ids, torch.tensor([sample.weights for sample in samples])


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean negative log-likelihood of the next tokens, in nats."""
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    nll = functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    return (nll * weight).sum() / weight.sum()


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, passages: list[list[int]]) -> float:
    """Return the perplexity per token of passages of one length."""
    ids = torch.tensor(passages)
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    return math.exp(functional.cross_entropy(logits, ids[:, 1:].flatten()).item())


@torch.inference_mode()
def recall(model: LlamaForCausalLM, exams: list[tuple[list[int], list[int]]], window: float | None = None) -> float:
    """Return the share of questions of which every token of the value is right.

    `window` hides from each query all but the newest share of the keys. The value is given and its tokens are
    predicted in one pass: all are right exactly when greedy decoding writes the value.
    """
    right = 0
    for prompt, value in exams:
        ids = torch.tensor([prompt + value])
        length = ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        if window is not None:
            mask = mask.triu(1 - math.ceil(window * length))
        logits = model(input_ids=ids, attention_mask=mask[None, None]).logits[0]
        said = logits[len(prompt) - 1 : -1].argmax(-1)
        right += int(torch.equal(said, ids[0, len(prompt) :]))
    return right / len(exams)


def judge(model: LlamaForCausalLM, source: Source, count: int) -> dict[str, Any]:
    """Return the scores on held-out text and episodes; the same draws every time."""
    model.eval()
    source.random.seed(99)
    source.numpy = type(source.numpy)(type(source.numpy.bit_generator)(99))
    exams = {distance: [source.exam(distance) for _ in range(count)] for distance in DISTANCES}
    scores = {
        "book_perplexity": round(perplexity(model, [source.text(512) for _ in range(16)]), 2),
        "recall_full": {distance: round(recall(model, exams[distance]), 3) for distance in DISTANCES},
        "recall_window_20": {distance: round(recall(model, exams[distance], 0.2), 3) for distance in DISTANCES},
    }
    model.train()
    return scores


def train(args: argparse.Namespace) -> None:
    """Train, log, and save the model and its tokenizer."""
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    books, held_out = read_books(args.texts)
    tokenizer = train_tokenizer(books, args.vocabulary)
    source, exam = Source(tokenizer, books, args.seed), Source(tokenizer, held_out, args.seed + 1)
    model = build(tokenizer.get_vocab_size())
    head_start(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.05)
    started, log = time.monotonic(), []
    recent: list[float] = []
    step, warm = 0, True
    while step < args.steps:
        minutes = (time.monotonic() - started) / 60
        done = max(step / args.steps, minutes / args.minutes)
        if done >= 1:
            break
        warm = warm and done < args.warm_up and not (len(recent) >= 20 and sum(recent[-20:]) < 20 * COPIED)
        rate = args.rate * min(1.0, (step + 1) / 100) * (1.0 if done < 0.4 else 0.03 + 0.97 * (1 - done) / 0.6)
        for group in optimizer.param_groups:
            group["lr"] = rate
        lengths = WARM_UP_LENGTHS if warm else SHORT_LENGTHS if done < SHORT else LENGTHS
        tokens = WARM_UP_TOKENS if warm else args.tokens
        ids, weights = batch(source, warm, lengths[step % len(lengths)], tokens)
        loss = loss_of(model, ids, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        step += 1
        if step % args.report == 0:
            entry = {
                "step": step,
                "minutes": round(minutes, 1),
                "warm_up": warm,
                "loss": round(sum(recent) / len(recent), 3),
            }
            recent = []
            if step % (args.report * 4) == 0:
                entry |= judge(model, exam, 12)
                save(model, tokenizer, args.output)
            log.append(entry)
            print(json.dumps(entry), flush=True)
    save(model, tokenizer, args.output)
    final = judge(LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32), exam, 100)
    print(json.dumps(final), flush=True)
    record = {
        "seed": args.seed,
        "parameters": parameters,
        "steps": step,
        "tokens_per_step": args.tokens,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "log": log,
        "final": final,
    }
    (args.output / "training_log.json").write_text(json.dumps(record, indent=1) + "\n")


def save(model: LlamaForCausalLM, tokenizer: Any, output: Path) -> None:
    """Write weights in 16 bit, configuration and tokenizer."""
    output.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.float16).save_pretrained(output)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", model_max_length=CONTEXT
    )
    wrapped.save_pretrained(output)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="folder with the books, one .txt each")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop by then, whatever the step")
    parser.add_argument(
        "--warm-up", type=float, default=0.25, help="share of the training that may go into copying alone"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="per step")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--report", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
