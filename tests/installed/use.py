"""Uses the installed package as a reader of its guides does, with nothing but what its installation brought.

    python -I tests/installed/use.py       # in an environment with hf_qst; `-I`: not from a clone

Every method once, on a tiny model: trained or made, saved, loaded, with the outputs compared. It takes seconds.
"""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import hf_qst
from hf_qst import DISPCallback, DISPConfig, MixedRankConfig, QSTConfig, adaptive_generate_kwargs, rank_report
from hf_qst_plugins.code_evaluation import read_problems
from hf_qst_plugins.gguf_files import write_gguf

IDS = torch.arange(3, 67).reshape(4, 16)


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def train(model, folder, callbacks=()) -> None:
    settings = TrainingArguments(
        folder, max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1e-2
    )
    Trainer(
        model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in IDS], callbacks=[*callbacks]
    ).train()


def same(model, again) -> None:
    torch.testing.assert_close(logits(model), logits(again), rtol=0, atol=1e-6)


def one_line_error(call, package: str, extra: str) -> None:
    """Without a package that an extra brings, the error names the extra."""
    if find_spec(package) is None:
        try:
            call()
        except ImportError as error:
            assert f"pip install 'hf_qst[{extra}]'" in str(error) and "\n" not in str(error), error
        else:
            raise AssertionError(f"no error without {package}")


def main(folder: str) -> None:
    for package in ("hf_qst", "hf_qst_kernels", "hf_qst_plugins"):
        place = Path(find_spec(package).origin).parent
        assert place.parent.name == "site-packages" and (place / "py.typed").exists(), place
    assert len(read_problems()) == 120 and len(hf_qst.supported_models()) > 150

    side_tuned = get_peft_model(tiny(), QSTConfig(task_type="CAUSAL_LM"))
    same(side_tuned, tiny())
    train(side_tuned, f"{folder}/qst")
    assert not torch.equal(logits(side_tuned), logits(tiny()))
    side_tuned.save_pretrained(f"{folder}/adapter")
    same(side_tuned, PeftModel.from_pretrained(tiny(), f"{folder}/adapter"))
    assert side_tuned.generate(IDS[:1], max_new_tokens=4, do_sample=False).shape[1] > 16

    learning = get_peft_model(tiny(), DISPConfig(task_type="CAUSAL_LM", keep_ratio=0.6))
    train(learning, f"{folder}/disp", [DISPCallback(progress=False)])
    batches = [{"input_ids": IDS}]
    factored = get_peft_model(tiny(), MixedRankConfig(keep_ratio=0.6, calibration_data=batches, progress=False))
    for name, model in (("pruned", learning), ("factored", factored)):
        small = model.merge_and_unload()
        assert small.num_parameters() < tiny().num_parameters()
        small.save_pretrained(f"{folder}/{name}")
        same(small, AutoModelForCausalLM.from_pretrained(f"{folder}/{name}"))
        same(small, hf_qst.to_dense(small))
    assert any(row["rank"] for row in rank_report(AutoModelForCausalLM.from_pretrained(f"{folder}/factored")))

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    kwargs = adaptive_generate_kwargs(PreTrainedTokenizerFast(tokenizer_object=made))
    assert tiny().generate(IDS[:1], **kwargs, max_new_tokens=4).shape[1] > 16

    factors = MixedRankConfig(keep_ratio=0.6, calibration_data=batches, quantize_factors="nf4", progress=False)
    one_line_error(lambda: hf_qst.compress_model(tiny(), factors), "bitsandbytes", "quantized")
    plots = DISPCallback(plot_directory=f"{folder}/plots", progress=False)
    again = get_peft_model(tiny(), DISPConfig(task_type="CAUSAL_LM", keep_ratio=0.6))
    one_line_error(lambda: train(again, f"{folder}/again", [plots]), "matplotlib", "plots")
    one_line_error(lambda: write_gguf(tiny(), None, f"{folder}/model.gguf"), "gguf", "gguf")
    print(f"hf_qst {hf_qst.__version__} works with Python {sys.version.split()[0]}, torch {torch.__version__}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(temporary)
