"""The hot path against one plain forward pass per sequence, and transformers' own generation."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from evomerge.fitness.hot import runner as runner_module
from evomerge.fitness.hot.forward import Forward
from evomerge.fitness.hot.likelihood import Continuation, arranged, log_likelihoods
from evomerge.fitness.hot.runner import Runner

VOCABULARY = 300
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
GROUPED = {**SHAPE, "num_key_value_heads": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1,
         "eos_token_id": 1},
    ),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 32}),
    "phi3": ("Phi3Config", GROUPED),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "gpt_neo": (
        "GPTNeoConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
         "attention_types": [[["global", "local"], 1]], "window_size": 16,
         "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 1},
    ),
    "longrope": (
        "Phi3Config",
        {**GROUPED, "max_position_embeddings": 128, "original_max_position_embeddings": 32,
         "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
         "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}},
    ),
    "bloom": (
        "BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 3) -> Any:
    """Return a tiny model whose predictions differ between contexts."""
    import transformers

    torch.manual_seed(seed)
    kind, shape = CONFIGS[name]
    config = getattr(transformers, kind)(**shape)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.to(dtype).eval()


def questions(seed: int) -> list[Continuation]:
    """Return few-shot questions with choices, and some that share nothing."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, VOCABULARY) for _ in range(draw.randint(low, high)))

    shots = tokens(40, 40)
    asked = []
    for _ in range(6):
        context = (*shots, *tokens(3, 12))
        asked += [Continuation(context, tokens(1, 5)) for _ in range(3)]
    for _ in range(5):
        context = tokens(2, 20)
        asked += [Continuation(context, tokens(1, 1)) for _ in range(3)]
    asked.append(Continuation(tokens(1, 1), tokens(30, 30)))
    draw.shuffle(asked)
    return asked


def plain(model: Any, one: Continuation, longest: int) -> tuple[float, bool]:
    """Return the answer from one whole forward pass."""
    tokens = (*one.context, *one.target)[-(longest + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    logits = logits[-len(one.target) :]
    target = torch.tensor(one.target)
    value = float(logits.gather(1, target[:, None]).sum())
    return value, bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("name", CONFIGS)
def test_log_likelihoods_equal_whole_passes(name: str) -> None:
    model = make(name)
    forward = Forward(model)
    assert forward.trees == forward.prefixes == (name != "bloom")
    for seed, budget, longest in ((0, 4096, 64), (1, 130, 64), (2, 64, 30)):
        asked = questions(seed)
        plan = arranged(forward, asked, longest)
        for one, (value, greedy) in zip(asked, log_likelihoods(forward, plan, budget), strict=True):
            expected = plain(model, one, longest)
            assert value == pytest.approx(expected[0], abs=2e-4)
            assert greedy == expected[1]


@pytest.mark.parametrize("head", [None, torch.nn.Linear(2, 2)])
def test_a_model_without_a_head_to_hook_gives_the_same_answers(head: Any) -> None:
    model = make("llama")
    model.get_output_embeddings = lambda: head
    asked = questions(0)
    forward = Forward(model)
    answers = log_likelihoods(forward, arranged(forward, asked, 64), 512)
    for one, (value, greedy) in zip(asked, answers, strict=True):
        expected = plain(model, one, 64)
        assert value == pytest.approx(expected[0], abs=2e-4)
        assert greedy == expected[1]


def test_shared_tokens_are_computed_once() -> None:
    forward = Forward(make("llama"))
    asked = questions(0)
    plan = arranged(forward, asked, 64)
    paths = {
        (*one.context, *one.target)[:end]
        for one in asked
        for end in range(1, len(one.context) + len(one.target))
    }
    # Not below the number of different beginnings; a few are left apart to keep rows short.
    assert len(paths) <= plan.tokens <= 1.1 * len(paths)


def test_half_precision_is_as_far_from_the_truth_as_a_whole_pass() -> None:
    exact = make("llama")
    model = make("llama", torch.bfloat16)
    forward = Forward(model)
    asked = questions(4)
    answers = log_likelihoods(forward, arranged(forward, asked, 64), 512)
    truth = [plain(exact, one, 64)[0] for one in asked]
    theirs = [abs(plain(model, one, 64)[0] - true) for one, true in zip(asked, truth, strict=True)]
    mine = [abs(value - true) for (value, _), true in zip(answers, truth, strict=True)]
    assert sum(mine) < 1.5 * sum(theirs)


def test_weights_that_change_in_place_change_the_answers() -> None:
    model, other = make("llama"), make("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.7)
    forward = Forward(model)
    plan = arranged(forward, questions(0), 64)
    before = log_likelihoods(forward, plan, 512)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    changed = log_likelihoods(forward, plan, 512)
    fresh = Forward(other)
    assert changed == log_likelihoods(fresh, arranged(fresh, questions(0), 64), 512)
    assert changed != before
    model.load_state_dict(state)
    assert log_likelihoods(forward, plan, 512) == before


@dataclass(frozen=True)
class Request:
    args: tuple[Any, ...]


def letters() -> Any:
    """Return a tokenizer with a token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1, **{one: n + 2 for n, one in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def lm_of(model: Any, batch_size: int = 4) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=letters(), batch_size=batch_size, max_length=120)


def prompts(until: list[str], most: int) -> list[Request]:
    draw = random.Random(0)
    made = []
    for number in range(14):
        shots = "many words that all of them begin with; " if number % 2 else ""
        text = shots + "".join(draw.choices("abcdefgh ", k=draw.randint(1, 12)))
        made.append(Request((text, {"until": until, "max_gen_toks": most, "do_sample": False})))
    return [*made, made[3]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "gpt_neo", "longrope"])
@pytest.mark.parametrize("budget", [64, 4096])
def test_generated_texts_are_those_of_transformers(name: str, budget: int) -> None:
    model = make(name)
    runner = Runner(lm_of(model), budget)
    free = runner.generate_until(prompts(["<never>"], 20))
    assert free == lm_of(model, batch_size=1).generate_until(
        prompts(["<never>"], 20), disable_tqdm=True
    )
    # Stop at what the model really says, in the middle of its texts.
    spoken = sorted({text[number : number + 2] for text in free for number in (2, 5)} - {""})
    asked = prompts(spoken[:3], 20)
    stopped = runner.generate_until(asked)
    assert stopped == lm_of(model, batch_size=1).generate_until(asked, disable_tqdm=True)
    assert any(len(a) < len(b) for a, b in zip(stopped, free, strict=True))


@pytest.mark.parametrize(("setting", "value"), [("repetition_penalty", 1.3), ("max_new_tokens", 5)])
def test_unusual_settings_go_to_lm_eval(
    monkeypatch: pytest.MonkeyPatch, setting: str, value: float
) -> None:
    model = make("llama")
    runner = Runner(lm_of(model, 1))
    monkeypatch.setattr(runner_module, "generate", None)  # would fail if it were called
    setattr(model.generation_config, setting, value)
    asked = prompts(["<never>"], 8)
    expected = lm_of(model, batch_size=1).generate_until(asked, disable_tqdm=True)
    assert runner.generate_until(asked) == expected
    if setting == "max_new_tokens":  # which transformers takes before what a task asks for
        assert max(map(len, expected)) == value


def test_an_empty_prompt_was_given_the_answer_to_another() -> None:
    """lm-eval reads an empty context as the token before all texts, in log-likelihoods too."""
    model = make("llama")
    runner = Runner(lm_of(model))
    settings = {"until": ["<never>"], "max_gen_toks": 6, "do_sample": False}
    start = runner.generate_until([Request(("<eos>", settings))])
    other = runner.generate_until([Request(("abc", settings))])
    assert start != other
    both = [Request(("", settings)), Request(("abc", settings))]
    assert runner.generate_until(both) == start + other
    assert runner.generate_until(both[:1]) == start


@pytest.mark.parametrize("name", ["gemma2", "longrope"])
def test_one_long_prompt_sent_all_others_to_lm_eval(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that an answer depended on what else was asked: long rows turn the short ones beside."""
    model = make(name)
    lm = lm_of(model)
    runner = Runner(lm)
    settings = {"until": ["<never>"], "max_gen_toks": 6, "do_sample": False}
    short = [Request((text, settings)) for text in ("abc", "some words", "")]
    long = [Request(("many words " * 5, settings))]
    alone = runner.generate_until(short)
    sent: list[str] = []
    whole = lm.generate_until

    def noted(requests: Any, **settings: Any) -> Any:
        sent.extend(request.args[0] for request in requests)
        return whole(requests, **settings)

    monkeypatch.setattr(lm, "generate_until", noted)
    both = runner.generate_until([*long, *short])
    assert both[1:] == alone
    assert both[:1] == lm_of(model, 1).generate_until(long, disable_tqdm=True)
    assert sent == [long[0].args[0]]


def test_windows_are_found_whatever_they_are_called() -> None:
    """GPT-Neo has local layers; long rotary embeddings turn a whole batch by its longest row."""
    import transformers

    windows = {
        name: Forward(make(name)).window for name in ("llama", "gpt_neo", "longrope", "gemma2")
    }
    assert windows == {"llama": None, "gpt_neo": 16, "longrope": 32, "gemma2": 32}
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = transformers.LlamaConfig(
        **GROUPED, max_position_embeddings=48, rope_parameters=dynamic
    )
    assert Forward(transformers.LlamaForCausalLM(config)).window == 48


def test_texts_longer_than_the_context_are_windowed_as_lm_eval_does() -> None:
    model = make("llama")
    runner = Runner(lm_of(model))
    texts = [Request(("a short text",)), Request(("long words " * 40,)), Request(("b" * 119,))]
    expected = lm_of(model).loglikelihood_rolling(texts, disable_tqdm=True)
    assert runner.loglikelihood_rolling(texts) == pytest.approx(expected, rel=1e-5)
    pairs = [Request(("words " * 40, "end")), Request(("", "alone")), Request(("a ", "b"))]
    theirs = lm_of(model).loglikelihood(pairs, disable_tqdm=True)
    for mine, other in zip(runner.loglikelihood(pairs), theirs, strict=True):
        assert mine[0] == pytest.approx(other[0], rel=1e-5)
        assert mine[1] == other[1]


def test_batches_shrink_until_they_fit_and_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(lm_of(make("llama")))
    runner.budget = 1000
    sizes = []
    whole = Forward.logits

    def small(self: Forward, rows: Any, prefix: Any = ()) -> tuple[torch.Tensor, torch.Tensor]:
        size = len(rows) * max(len(row.tokens) for row in rows)
        sizes.append(size)
        if size > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, rows, prefix)

    asked = [Request((f"{'x' * number} question {number}", "yes")) for number in range(20)]
    expected = runner.loglikelihood(asked)
    monkeypatch.setattr(Forward, "logits", small)
    answers = runner.loglikelihood(asked)
    assert [value for value, _ in answers] == pytest.approx([value for value, _ in expected])
    assert runner.budget == 125
    assert runner.facts()["batch_tokens"] == "125"
    given = Runner(lm_of(make("llama")), 1000)
    with pytest.raises(torch.OutOfMemoryError):
        given.loglikelihood(asked)
    # What an earlier run found, on another device maybe, is not what the user asked for.
    resumed = Runner(lm_of(make("llama")), 1000, found=True)
    answers = resumed.loglikelihood(asked)
    assert [value for value, _ in answers] == pytest.approx([value for value, _ in expected])
    assert resumed.budget == 125
