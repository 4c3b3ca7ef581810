"""Ollama's official client against a model behind the pass-through: ollama_client.py URL

URL is the gateway's /upstream/qwen; `qwen` is what Ollama knows as qwen:7b. Beside it `llama3` is there.
"""

import sys

import ollama

client = ollama.Client(host=sys.argv[1], timeout=60)


def loaded():
    return {row.model: row.expires_at for row in client.ps().models}


for name in ("qwen", "qwen:7b"):
    reply = client.chat(model=name, messages=[{"role": "user", "content": "who are you?"}])
    assert reply.message.content.startswith("qwen:7b-1"), reply
    text = client.generate(model=name, prompt="who are you?")
    assert text.response.startswith("qwen:7b-1") and text.done, text
print("chat:", reply.message.content[:30])

parts = list(client.chat(model="qwen", messages=[{"role": "user", "content": "x"}], stream=True))
assert parts[-1].done and "".join(part.message.content for part in parts).startswith("qwen:7b-1")
print("streamed in", len(parts), "parts")
assert {row.model for row in client.list().models} == {"qwen:7b", "llama3:latest"}, client.list()
assert set(loaded()) == {"qwen:7b"}, loaded()
print("ps:", ", ".join(loaded()))

# How long a model stays is Wharf's affair: neither "at once" nor "for ever" reaches Ollama.
client.generate(model="qwen", prompt="x", keep_alive=0)
assert set(loaded()) == {"qwen:7b"}, loaded()
client.chat(model="qwen", messages=[{"role": "user", "content": "x"}], keep_alive="0s")
assert set(loaded()) == {"qwen:7b"}, loaded()


def expect(status, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except ollama.ResponseError as raised:
        assert raised.status_code == status, (raised.status_code, raised.error)
        print(f"{status}: {str(raised.error)[:110]}")
        return
    sys.exit(f"expected {status} from {call.__name__} {kwargs}")


expect(400, client.generate, model="qwen", prompt="", keep_alive=0)
expect(400, client.generate, model="qwen", keep_alive=-1)
expect(400, client.chat, model="qwen", messages=[], keep_alive=0)
expect(400, client.generate, model="llama3", prompt="x")
expect(403, client.delete, "llama3")
expect(403, client.pull, "llama3")
assert set(loaded()) == {"qwen:7b"}, loaded()
print("fences: ok")
