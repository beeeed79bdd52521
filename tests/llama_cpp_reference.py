"""Logits and tokens by llama.cpp, in a process of its own: it ends the process where it finds a file wrong.

python tests/llama_cpp_reference.py REQUEST ANSWER        # JSON {"file", "ids", "texts"}; torch {"logits", "tokens"}
"""

import json
import sys

import torch
from cyllama.llama import llama_cpp


class Model(llama_cpp.LlamaModel):
    @property
    def n_vocab(self):  # its context asks the model for it, which has it in the vocabulary
        return self.get_vocab().n_vocab


def main(request: str, answer: str) -> None:
    llama_cpp.disable_logging()
    with open(request) as file:
        asked = json.load(file)
    settings = llama_cpp.LlamaModelParams()
    settings.n_gpu_layers = 0
    model = Model(asked["file"], settings, verbose=False)
    options = llama_cpp.LlamaContextParams()
    options.n_ctx, options.n_threads, options.n_threads_batch = 256, 1, 1
    options.type_k = options.type_v = options.flash_attn_type = 0  # keys and values in float32
    context, logits = llama_cpp.LlamaContext(model, options, verbose=False), []
    for position, token in enumerate(asked["ids"]):
        batch = llama_cpp.LlamaBatch(n_tokens=1, embd=0, n_seq_max=1, verbose=False)
        batch.set_batch([token], position, True)
        context.decode(batch)
        logits.append(list(context.get_logits()))
    vocabulary = model.get_vocab()
    tokens = [list(vocabulary.tokenize(text, True, True)) for text in asked["texts"]]
    torch.save({"logits": torch.tensor(logits), "tokens": tokens}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
