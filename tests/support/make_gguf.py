#!/usr/bin/env python3
"""Writes tiny llama-architecture GGUF files whose replies name the model that answered.

    make_gguf.py FOLDER NAME [NAME ...]            one FOLDER/NAME.gguf each, about 0.5 MB
    make_gguf.py --layers 32 --large FOLDER NAME   63 MB for each layer: 2 GB

Nothing is downloaded: weights are made here. The blocks hold random weights and run like those of
any model, but a few dimensions of the residual stream are kept out of their reach. These carry a
chain, so that any prompt is answered with "NAME-1 NAME-2 ... NAME-16" and then the end of the
sequence. Needs the packages gguf and numpy.
"""

import argparse
import pathlib

import gguf
import numpy

CHAIN = 16
WIDTH, LAYERS, HEADS, KV_HEADS, FEED_FORWARD, CONTEXT = 64, 2, 4, 2, 128, 2048
HEAD = WIDTH // HEADS
END = 2  # </s>
KEPT = CHAIN + 1  # dimensions that the blocks must not write: "always on" and one per reply token


def vocabulary(name):
    """SentencePiece style with byte fallback, so that any prompt can be encoded."""
    kind = gguf.TokenType
    entries = [(b"<unk>", 0.0, kind.UNKNOWN), (b"<s>", 0.0, kind.CONTROL), (b"</s>", 0.0, kind.CONTROL)]
    entries += [(f"<0x{byte:02X}>".encode(), -1e4, kind.BYTE) for byte in range(256)]
    entries += [(mark.encode(), -1e3, kind.NORMAL) for mark in ["\u2581", *map(chr, range(33, 127))]]
    first_reply = len(entries)
    entries += [(f"\u2581{name}-{n}".encode(), -1e4 - n, kind.NORMAL) for n in range(1, CHAIN + 1)]
    return entries, first_reply


def embeddings(rng, size, first_reply):
    """Input and output embeddings that turn the kept dimensions into the chain."""
    incoming, outgoing = weights(rng, size, WIDTH), weights(rng, size, WIDTH)
    incoming[:, :KEPT] = 0
    outgoing[:, :KEPT] = 0
    incoming[:, 0] = 1.0
    outgoing[:, 0] = -8.0
    outgoing[first_reply, 0] = 4.0  # after anything else: begin the chain
    for n in range(CHAIN):
        incoming[first_reply + n, 1 + n] = 3.0
        following = first_reply + n + 1 if n + 1 < CHAIN else END
        outgoing[following, 1 + n] = 12.0
    return incoming, outgoing


def enlarge(layers):
    global WIDTH, LAYERS, HEADS, KV_HEADS, FEED_FORWARD, HEAD
    WIDTH, LAYERS, HEADS, KV_HEADS, FEED_FORWARD, HEAD = 1024, layers, 16, 8, 4096, 64


def weights(rng, *shape):
    return (rng.standard_normal(shape) * 0.02).astype(numpy.float32)


def write(path, name):
    rng = numpy.random.default_rng(0)
    entries, first_reply = vocabulary(name)
    incoming, outgoing = embeddings(rng, len(entries), first_reply)
    out = gguf.GGUFWriter(path, "llama")
    out.add_name(name)
    out.add_context_length(CONTEXT)
    out.add_embedding_length(WIDTH)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(FEED_FORWARD)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(HEAD)
    out.add_vocab_size(len(entries))
    out.add_file_type(gguf.LlamaFileType.ALL_F32)
    out.add_tokenizer_model("llama")
    out.add_token_list([text for text, _, _ in entries])
    out.add_token_scores([score for _, score, _ in entries])
    out.add_token_types([kind for _, _, kind in entries])
    out.add_bos_token_id(1)
    out.add_eos_token_id(END)
    out.add_unk_token_id(0)
    out.add_add_bos_token(True)
    out.add_add_space_prefix(True)
    out.add_chat_template("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:")
    out.add_tensor("token_embd.weight", incoming)
    out.add_tensor("output_norm.weight", numpy.ones(WIDTH, numpy.float32))
    out.add_tensor("output.weight", outgoing)
    attention_out, down = weights(rng, WIDTH, HEADS * HEAD), weights(rng, WIDTH, FEED_FORWARD)
    attention_out[:KEPT] = 0
    down[:KEPT] = 0
    block = {  # the same in every layer
        "attn_norm": numpy.ones(WIDTH, numpy.float32),
        "attn_q": weights(rng, HEADS * HEAD, WIDTH),
        "attn_k": weights(rng, KV_HEADS * HEAD, WIDTH),
        "attn_v": weights(rng, KV_HEADS * HEAD, WIDTH),
        "attn_output": attention_out,
        "ffn_norm": numpy.ones(WIDTH, numpy.float32),
        "ffn_gate": weights(rng, FEED_FORWARD, WIDTH),
        "ffn_up": weights(rng, FEED_FORWARD, WIDTH),
        "ffn_down": down,
    }
    for layer in range(LAYERS):
        for tensor, values in block.items():
            out.add_tensor(f"blk.{layer}.{tensor}.weight", values)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--large", action="store_true")
    arguments.add_argument("--layers", type=int, default=32)
    arguments.add_argument("folder", type=pathlib.Path)
    arguments.add_argument("names", nargs="+")
    given = arguments.parse_args()
    if given.large:
        enlarge(given.layers)
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in given.names:
        write(str(given.folder / f"{name}.gguf"), name)


main()
