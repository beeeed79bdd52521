"""Rows of tokens: those of TRL where there is a prompt or a conversation, and the mean loss over them."""

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hf_qst_plugins.inputs import BlockDataset, Collator, held_out_loss, token_rows
from tests.architectures import tiny
from tests.toy_data import tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ 't5 ' if m['role'] == 'user' else 't6 ' }}{{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}t6 {% endif %}"
)
TURNS = [{"role": "user", "content": "t10 t11"}, {"role": "assistant", "content": "t12 t13 t14"}]
EXAMPLES = {
    "messages": [{"messages": TURNS}, {"messages": [*TURNS, {"role": "user", "content": "t9"}]}],
    "conversational pair": [{"prompt": TURNS[:1], "completion": TURNS[1:]}] * 2,
    "pair": [{"prompt": "t7 t8", "completion": " t9 t10"}, {"prompt": "t7", "completion": " t11 </s>"}],
}


@pytest.fixture
def chat_tokenizer():
    made = tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize("form", EXAMPLES)
def test_tokens_and_labels_are_those_of_trl(chat_tokenizer, form, tmp_path):
    settings = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=32)
    trainer = SFTTrainer(
        tiny("llama"), settings, train_dataset=Dataset.from_list(EXAMPLES[form]), processing_class=chat_tokenizer
    )
    rows = token_rows(EXAMPLES[form], chat_tokenizer, 32)
    assert rows == [{name: row[name] for name in ("input_ids", "labels")} for row in trainer.train_dataset]
    assert any(-100 in row["labels"] for row in rows) == (form != "messages")


def test_text_is_packed_with_an_end_token_after_each(chat_tokenizer):
    rows = token_rows([{"text": "t3 t4 t5 t6 t7"}, {"text": "t8"}], chat_tokenizer, 4)
    assert isinstance(rows, BlockDataset)
    assert rows.rows.tolist() == [[3, 4, 5, 6], [7, 2, 8, 2]]


def test_a_prompt_that_fills_the_row_is_left_out(chat_tokenizer):
    assert token_rows(
        [{"prompt": "t3 t4 t5 t6", "completion": " t7"}, {"prompt": "t3", "completion": " t4"}], chat_tokenizer, 4
    ) == [{"input_ids": [3, 4, 2], "labels": [-100, 4, 2]}]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"tekst": "x"}], "fields tekst; it needs text, messages, or prompt and completion"),
        ([{"text": "x"}, {"messages": TURNS}], "different forms: messages, text"),
    ],
)
def test_examples_of_no_known_form_are_refused(chat_tokenizer, examples, message):
    with pytest.raises(ValueError, match=message):
        token_rows(examples, chat_tokenizer, 8)


def test_messages_need_a_template():
    with pytest.raises(ValueError, match="has no chat template"):
        token_rows(EXAMPLES["messages"], tokenizer(), 8)


def test_collator_pads_on_the_right():
    batch = Collator(0)([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in Collator(0)([{"input_ids": [5], "labels": [5]}] * 2)


def test_loss_over_rows_of_different_lengths_is_the_sum_over_the_count():
    model = tiny("llama")
    rows = [{"input_ids": [5, 6, 7, 9], "labels": [-100, -100, 7, 9]}, {"input_ids": [8, 3], "labels": [8, 3]}]
    sums = [
        model(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss.item() for r in rows
    ]
    assert held_out_loss(model, rows, 2) == pytest.approx((2 * sums[0] + sums[1]) / 3, abs=1e-5)
