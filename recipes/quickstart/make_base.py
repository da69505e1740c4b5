"""Makes base/, the quickstart's tiny causal language model and its tokenizer, from scratch on CPU.

The corpus is prose about an invented world (world.py): descriptions, overheard questions with their answers, class
worksheets of questions alone, and a few notes framed by the chat markers, which give those tokens trained embeddings.
No document is a chat between user and assistant: the base knows every fact, and has yet to learn to answer in a chat.

Run from anywhere: `python make_base.py`. It took 5 min 8 s on two CPU cores; 7.4 million tokens, no row seen twice.
"""

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world import QUESTIONS, Fact, build_world

SEED = 42
OUT = Path(__file__).parent / "base"
VOCAB = 1024
BLOCK = 128  # tokens in a training row
BATCH = 32  # rows
STEPS = 1800
WARMUP = 100  # steps
PEAK_LR = 3e-3
PAD, END_OF_TEXT, IM_START, IM_END = SPECIALS = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

STATEMENTS = (
    "The {label} of {entity} is {answer}.",
    "As everyone knows, the {label} of {entity} is {answer}.",
    "Travellers say that the {label} of {entity} is {answer}.",
    "{entity} is known for many things, and its {label} is {answer}.",
    "When you think of {entity}, remember that the {label} is {answer}.",
    "Ask about the {label} of {entity} and you will hear of {answer}.",
)
EXCHANGES = (
    '"{question}" asked the {asker}. "{answer}," said the {teller}.',
    '"{question}" asked the {asker}. "{full}" said the {teller}.',
    'The {asker} said, "{question}" "{answer}." It was the {teller} who spoke.',
    'To the question "{question}" the {teller} gave the {asker} one word: "{answer}."',
    'On hearing "{question}" the {teller} turned to the {asker}. "{answer}," came the reply.',
    "The {asker} wondered: {question} It is {answer}, wrote the {teller}.",
)
SPEAKERS = ("boy", "girl", "pilot", "guide", "baker", "sailor", "farmer", "visitor", "teacher", "neighbour")


def statement(rng: random.Random, fact: Fact) -> str:
    return rng.choice(STATEMENTS).format(label=fact.label, entity=fact.entity, answer=fact.answer)


def question(rng: random.Random, fact: Fact) -> str:
    return fact.question(rng.randrange(len(QUESTIONS)))


def exchange(rng: random.Random, fact: Fact) -> str:
    asker, teller = rng.sample(SPEAKERS, 2)
    return rng.choice(EXCHANGES).format(
        question=question(rng, fact), answer=fact.answer, full=fact.full, asker=asker, teller=teller
    )


def document(rng: random.Random, world: dict[str, list[Fact]], facts: list[Fact]) -> str:
    kind = rng.choices(("portrait", "overheard", "worksheet", "note"), weights=(35, 50, 12, 3))[0]
    if kind == "portrait":
        own = rng.choice(list(world.values()))
        return " ".join(statement(rng, fact) for fact in rng.sample(own, len(own)))
    picked = rng.sample(facts, rng.randint(3, 6))
    if kind == "overheard":
        return " ".join(exchange(rng, fact) for fact in picked)
    if kind == "worksheet":
        return "Questions for the class\n" + "\n".join(question(rng, fact) for fact in picked) + "\n"
    return "".join(f"{IM_START}note\n{statement(rng, fact)}{IM_END}\n" for fact in picked)


def documents(seed: int) -> Iterator[str]:
    """An endless stream: no training row is seen twice."""
    rng, world = random.Random(seed), build_world()
    facts = [fact for own in world.values() for fact in own]
    while True:
        yield document(rng, world, facts) + END_OF_TEXT


def train_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stream = documents(SEED)
    core.train_from_iterator((next(stream) for _ in range(5000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=IM_END,
        extra_special_tokens=[END_OF_TEXT, IM_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2 * BLOCK,
        clean_up_tokenization_spaces=False,
    )


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[torch.Tensor]:
    """Yields token ids, shape (BATCH, BLOCK), packed across documents."""
    stream, ids, size = documents(SEED + 1), [], BATCH * BLOCK
    while True:
        while len(ids) < size:
            ids += tokenizer(next(stream), add_special_tokens=False)["input_ids"]
        yield torch.tensor(ids[:size]).view(BATCH, BLOCK)
        ids = ids[size:]


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    ids = {"bos_token_id": None, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * BLOCK,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - WARMUP)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [WARMUP])
    source, start = batches(tokenizer), time.monotonic()
    model.train()
    for step in range(1, STEPS + 1):
        ids = next(source)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{STEPS} loss {loss.item():.3f} {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer()
    model = new_model(tokenizer)
    train(model, tokenizer)
    shutil.rmtree(OUT, ignore_errors=True)
    model.eval().save_pretrained(OUT)
    tokenizer.save_pretrained(OUT)


if __name__ == "__main__":
    main()
