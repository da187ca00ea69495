"""The advice of a refusal about a model works when it is followed: files are changed, or options, as the refusal says.

`tests/cli/test_advice.py` has those about what is recorded. A list at the end of this file says where other advice is
followed, or why it cannot be.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run
from tests.models.build import saved

PACKAGE = Path(__file__).parents[2] / "kvscope"
PROMPT = " ".join(f"w{(7 * number) % 101 + 3}" for number in range(14))
TRACE = ["trace", "--model", "model", "prompt.txt", "--max-new-tokens", "3", "--output", "t", "--force"]
H2O = ["--policy", "h2o", "--budget", "6"]
CLOSED = ["replay", "t", *H2O, "--perplexity"]
Steps = tuple[list[str], Callable[[str], list[str]]]  # what is refused, and what follows the advice


def edited(file: str, **changes: object) -> None:
    """Change fields of a JSON file; None removes one."""
    data = json.loads(Path(file).read_text())
    data |= changes
    Path(file).write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


def weights(change: Callable[[str, torch.Tensor], torch.Tensor], folder: str = "model") -> None:
    """Change the weights of a model."""
    file = Path(folder) / "model.safetensors"
    save_file({name: change(name, value) for name, value in load_file(file).items()}, file, {"format": "pt"})


def omitted(command: list[str], option: str, values: int = 0) -> list[str]:
    """Return a command without an option and its values."""
    place = command.index(option)
    return command[:place] + command[place + 1 + values :]


def recorded(run: Run, name: str, *options: str) -> None:
    """Record a trace of a type in the folder ``t``; its model is in ``model``."""
    saved(Path("model"), name)
    done = run(*TRACE, *options)
    assert done.status == 0, done.err


def no_attention(run: Run) -> Steps:
    """A type without attention, then one of the list."""
    saved(Path("model"), "mamba")
    return TRACE, lambda _: of_the_list(run)


def other_models(run: Run) -> Steps:
    """A type that writes audio, then one of the list."""
    saved(Path("model"), "musicgen")
    return TRACE, lambda _: of_the_list(run)


def no_language(run: Run) -> Steps:
    saved(Path("model"), "xmod")
    edited("model/config.json", default_language=None)

    def followed(todo: str) -> list[str]:
        ((field, languages),) = re.findall(r"Set (\w+) in its config.json to one of its languages: (.+)", todo)
        edited("model/config.json", **{field: languages.split(", ")[0]})
        return TRACE

    return TRACE, followed


def no_rows(run: Run) -> Steps:
    saved(Path("model"), "xlm")
    return TRACE, lambda _: of_the_list(run)


def of_the_list(run: Run) -> list[str]:
    types = json.loads(run("models", "--json").out)["types"]
    name = next(one["name"] for one in types if (one["trace"], one["verify"]) == ("rows", "equal"))
    shutil.rmtree("model")
    saved(Path("model"), name)
    return TRACE


def encoder(run: Run) -> Steps:
    saved(Path("model"), "bert")
    edited("model/config.json", is_decoder=False)

    def followed(_: str) -> list[str]:
        edited("model/config.json", is_decoder=True)
        return TRACE

    return TRACE, followed


def compacted(run: Run) -> Steps:
    recorded(run, "gpt2")
    command = [*CLOSED, "--positions", "compacted"]
    return command, lambda todo: [*CLOSED, "--positions", *re.findall(r"--positions (\w+)", todo)]


def repeated_keys(run: Run) -> Steps:
    recorded(run, "jetmoe")
    return ["verify", "t", *H2O], lambda _: ["replay", "t", *H2O]


def unknown_layers(run: Run) -> Steps:
    recorded(run, "unlimited_ocr")
    return ["verify", "t", *H2O], lambda _: ["replay", "t", *H2O]


def other_weights(run: Run) -> Steps:
    recorded(run, "llama")
    shutil.copytree("model", "traced")
    weights(lambda name, value: value * 1.5 if "q_proj" in name else value)
    return CLOSED, lambda _: [*CLOSED, "--model", "traced"]


def fewer_tokens(run: Run) -> Steps:
    recorded(run, "llama")
    shutil.move("model", "traced")
    saved(Path("model"), "llama")
    edited("model/config.json", vocab_size=40)
    weights(lambda name, value: value[:40].clone() if value.shape[0] == 128 else value)
    return CLOSED, lambda _: [*CLOSED, "--model", "traced"]


def not_finite(run: Run) -> Steps:
    saved(Path("model"), "llama")
    weights(lambda name, value: value * 4e5 if re.search("[qk]_proj", name) else value)
    command = [*TRACE, "--dtype", "float16"]
    return command, lambda todo: [*TRACE, "--dtype", *re.findall(r"--dtype (\w+)", todo)]


def own_code(run: Run) -> Steps:
    saved(Path("model"), "llama")
    code = "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
    code += 'class OwnConfig(LlamaConfig):\n    model_type = "own"\n\n\n'
    code += "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    Path("model/own.py").write_text(code)
    edited(
        "model/config.json",
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    )
    return TRACE, lambda todo: [*TRACE, *re.findall(r"--trust-remote-code", todo)]


def both(run: Run) -> Steps:
    saved(Path("model"), "llama")
    Path("model/adapter_config.json").write_text("{}")

    def followed(_: str) -> list[str]:
        Path("model/adapter_config.json").unlink()
        return TRACE

    return TRACE, followed


def adapter(base: object) -> None:
    """Save a LoRA adapter of a tiny Llama in the folder ``model``, and the Llama in ``base``."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    saved(Path("base"), "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that transformers is to remove
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config).save_pretrained("model")
    edited("model/adapter_config.json", base_model_name_or_path=base)


def no_base(run: Run) -> Steps:
    adapter(None)

    def followed(_: str) -> list[str]:
        edited("model/adapter_config.json", base_model_name_or_path="base")
        return TRACE

    return TRACE, followed


def wrong_base(run: Run) -> Steps:
    adapter("elsewhere")

    def followed(_: str) -> list[str]:
        edited("model/adapter_config.json", base_model_name_or_path=str(Path("base").resolve()))
        return TRACE

    return TRACE, followed


def two_files(run: Run) -> Steps:
    pytest.importorskip("gguf")
    from tests.model.test_gguf import written

    Path("model").mkdir()
    written(Path("model/a.gguf"))
    written(Path("model/b.gguf"))
    Path("prompt.txt").write_text("a b a c a b a d e f")

    def followed(todo: str) -> list[str]:
        (name,) = re.findall(r"--model (\S+)", todo)
        return [word if word != "model" else name for word in TRACE]

    return TRACE, followed


def quantized(run: Run) -> Steps:
    saved(Path("model"), "llama")
    command = [*TRACE, "--device", "cpu", "--quantize", "4bit"]
    return command, lambda _: omitted(command, "--quantize", 1)


def no_revision(run: Run) -> Steps:
    saved(Path("model"), "llama")
    command = [*TRACE, "--revision", "main"]
    return command, lambda _: omitted(command, "--revision", 1)


def template(source: str) -> None:
    """Give the tokenizer of the model a chat template."""
    saved(Path("model"), "llama")
    edited("model/tokenizer_config.json", chat_template=source)


def empty_template(run: Run) -> Steps:
    template("{% for message in messages %}{% endfor %}")
    command = [*TRACE, "--chat"]
    return command, lambda _: omitted(command, "--chat")


def refusing_template(run: Run) -> Steps:
    template("{% if not mode %}{{ raise_exception('needs mode') }}{% endif %}{{ messages[0].content }}")
    command = [*TRACE, "--chat"]
    return command, lambda todo: [*command, *re.findall(r"--chat-option", todo), "mode=x"]


def broken_template(run: Run) -> Steps:
    template("{% if %}")
    command = [*TRACE, "--chat"]
    return command, lambda _: omitted(command, "--chat")


def image_without_processor(run: Run) -> Steps:
    image = pytest.importorskip("PIL.Image")
    saved(Path("model"), "llava")
    image.new("RGB", (8, 8)).save("image.png")
    command = [*TRACE, "--image", "image.png"]
    return command, lambda _: omitted(command, "--image", 1)


def image_for_a_text_model(run: Run) -> Steps:
    image = pytest.importorskip("PIL.Image")
    saved(Path("model"), "llama")
    image.new("RGB", (8, 8)).save("image.png")
    command = [*TRACE, "--image", "image.png"]
    return command, lambda _: omitted(command, "--image", 1)


def no_index(run: Run) -> Steps:
    recorded(run, "llama")

    def followed(todo: str) -> list[str]:
        name = next(name for name in re.findall(r"\w+", todo) if "dsa" in name)
        shutil.rmtree("model")
        recorded(run, name)
        return ["replay", "t", "--policy", "indexer"]

    return ["replay", "t", "--policy", "indexer"], followed


def rows_alone(run: Run) -> Steps:
    recorded(run, "bloom")
    command = ["replay", "t", "--policy", "keydiff", "--budget", "6"]

    def followed(todo: str) -> list[str]:
        return ["replay", "t", "--budget", "6", *(f"--policy={name}" for name in re.findall(r"h2o|tova", todo))]

    return command, followed


def without_owner(run: Run) -> Steps:
    from tests.model.test_shared_caches import sharing
    from tests.models import build

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "config_of", sharing)
        saved(Path("model"), "gemma3n_text")
    assert run(*TRACE, "--layers", "0,3").status == 0

    def followed(todo: str) -> list[str]:
        (layers,) = re.findall(r"--layers ([\d,]+)", todo)
        assert run(*TRACE, "--layers", layers).status == 0
        return ["replay", "t", *H2O]

    return ["replay", "t", *H2O], followed


def per_head_of_a_latent(run: Run) -> Steps:
    recorded(run, "deepseek_v3")
    command = ["replay", "t", "--policy", "ada-kv", "--budget", "6", "--scope", "layer"]
    return command, lambda _: omitted(command, "--scope", 1)


# What is refused -> a part of what the refusal advises.
CASES: dict[Callable[[Run], Steps], str] = {
    no_attention: "kvscope models lists the types",
    other_models: "kvscope models lists the types",
    no_language: "Set default_language in its config.json",
    no_rows: "kvscope models lists those that can be traced",
    encoder: "is_decoder is true in its config.json",
    compacted: "--positions original",
    repeated_keys: "kvscope replay without --perplexity",
    unknown_layers: "kvscope replay without --perplexity",
    other_weights: "Give the model that was traced with --model, and its --dtype",
    fewer_tokens: "Give the model that was traced with --model",
    not_finite: "--dtype float32",
    own_code: "add --trust-remote-code",
    both: "remove adapter_config.json",
    no_base: "Write its folder or Hub id in base_model_name_or_path",
    wrong_base: "correct base_model_name_or_path in its adapter_config.json",
    two_files: "Name one of them: --model",
    quantized: "Omit --quantize here",
    no_revision: "Omit --revision",
    empty_template: "Omit --chat",
    refusing_template: "--chat-option",
    broken_template: "Omit --chat",
    image_without_processor: "omit the images",
    image_for_a_text_model: "or omit the images",
    no_index: "glm_moe_dsa",
    rows_alone: "such as h2o and tova",
    without_owner: "Record it again with --layers",
    per_head_of_a_latent: "Omit --scope for it",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_advice_is_followed(case: Callable[[Run], Steps], run: Run) -> None:
    Path("prompt.txt").write_text(PROMPT)
    refused, follow = case(run)
    first = run(*refused)
    what, todo = first.two_lines()
    assert first.status and CASES[case] in todo, (what, todo)
    second = run(*follow(todo))
    assert second.status == 0, (what, todo, second.err)


# Advice that names an option or a command, and is not followed here: where it is followed, or why it cannot be.
ELSEWHERE = {
    "Record the rows: --store maps.": "test_advice.py",
    "Record the rows alone: --store maps, without --hidden, --outputs and --reread.": "test_advice.py",
    "Record the trace without --reread.": "tests/policies/test_kvzip.py",
    "Record the layers with attention: --layers": "test_advice.py",
    "Try --dtype bfloat16, --device-map auto": "needs a model that memory does not hold",
    "Accept its terms at huggingface.co/": "needs the Hub",
    "Check the name; for a private model run: hf auth login": "needs the Hub",
    "Check --revision.": "needs the Hub",
    "Merge them: llama-gguf-split --merge": "needs llama.cpp",
    "Place them as its chat template does (--chat)": "tests/model/test_images.py",
    "Use --dtype auto.": "weights that stay quantised need a GPU",
    "Record the trace without --hidden.": "no type of transformers hides the input of its attention",
    "Record the trace with --dtype float32.": "no type of transformers computes vectors in other types than it says",
}


def advice() -> list[str]:
    """Return what refusals about models advise, without what is filled in, where it names an option or a command."""
    found = []
    for file in sorted([*(PACKAGE / "model").glob("*.py"), *(PACKAGE / "closed_loop").glob("*.py")]):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ModelError" and len(node.args) == 2:
                parts = [node.args[1]] if not isinstance(node.args[1], ast.JoinedStr) else node.args[1].values
                texts = [part.value for part in parts if isinstance(part, ast.Constant)]
                found += (
                    ["{}".join(map(str, texts))]
                    if re.search(r"--\w|kvscope (?:models|replay|verify|trace|info)|hf auth", "".join(map(str, texts)))
                    else []
                )
    return found


def test_all_advice_with_an_option_is_followed_or_listed() -> None:
    every = advice()
    assert len(every) > 20
    known = [*CASES.values(), *ELSEWHERE]
    unknown = [todo for todo in every if not any(part in todo or todo.split("{}")[0] in part for part in known)]
    assert not unknown, "follow it in a case, or say in ELSEWHERE why it cannot be"
    assert not [part for part in ELSEWHERE if not any(part in todo for todo in every)], "no refusal says it any more"
