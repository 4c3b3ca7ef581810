"""The official client against a running gateway: openai_client.py URL MODEL OTHER BROKEN KEYED_URL

Behind KEYED_URL the keys `key-of-a-reader-001` (cannot infer), `key-of-ada-only-001` (one model) and
`key-with-a-limit-001` (one request a minute) are known.
"""

import time

import sys

import openai

url, model, other, broken, keyed = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)
ask = {"messages": [{"role": "user", "content": "who are you?"}], "max_tokens": 8}


def expect(error, **request):
    try:
        client.chat.completions.create(**{**ask, **request})
    except error as raised:
        print(f"{error.__name__}: {raised.message[:100]}")
        return raised
    sys.exit(f"expected {error.__name__} from {request}")


names = [entry.id for entry in client.models.list()]
assert {model, other} <= set(names), names
print("models.list():", ", ".join(names))

for name in (model, other):
    reply = client.chat.completions.create(model=name, **ask)
    assert reply.choices[0].message.content.strip().startswith(f"{name}-1"), reply
    assert reply.usage.completion_tokens > 0, reply
    print(f"{name}:", reply.choices[0].message.content.strip()[:30])

stream = client.chat.completions.create(model=model, stream=True, **ask)
chunks = [chunk for chunk in stream]
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text.strip().startswith(f"{model}-1"), text
assert all(chunk.choices for chunk in chunks), "no usage chunk was asked for"
print(f"{model}, streamed in {len(chunks)} chunks:", text.strip()[:30])

stream = client.chat.completions.create(
    model=model, stream=True, stream_options={"include_usage": True}, **ask
)
usage = [chunk.usage for chunk in stream if chunk.usage]
assert usage and usage[-1].completion_tokens > 0, usage
print("usage, when asked for:", usage[-1].completion_tokens, "tokens")

missing = expect(openai.NotFoundError, model=model + "x")
assert missing.code == "model_not_found" and model in missing.message, missing
expect(openai.BadRequestError, model="")
error = expect(openai.InternalServerError, model=broken)
assert error.status_code == 503 and error.response.headers["retry-after"], error
print("typed exceptions: ok")

one = client.models.retrieve(model)
assert one.id == model and one.object == "model", one
embedded = client.embeddings.create(model=model, input=["one", "two"], encoding_format="float")
assert len(embedded.data) == 2 and embedded.data[0].embedding != embedded.data[1].embedding
assert embedded.usage.prompt_tokens > 0, embedded.usage
print("embeddings:", len(embedded.data), "vectors of", len(embedded.data[0].embedding))
text = client.completions.create(model=model, prompt="who are you?", max_tokens=4)
assert text.choices[0].text.strip().startswith(f"{model}-1"), text

# What the engine does not have is its own 404, raised as such.
expect_engine = None
try:
    client.responses.create(model=model, input="hello")
except openai.NotFoundError as raised:
    expect_engine = raised
assert expect_engine is not None and "/v1/responses" in expect_engine.message, expect_engine

# A retry comes when Retry-After says, and finds the model that was loaded meanwhile.
client.chat.completions.create(model=other, **ask)
client.post(f"{url}/api/models/unload/{model}", cast_to=str)
seen = []


def load_after_the_first_refusal(response):
    seen.append((response.status_code, time.monotonic(), response.headers.get("retry-after")))
    if len(seen) == 1:
        client.chat.completions.create(model=model, **ask)


patient = openai.OpenAI(
    base_url=f"{url}/v1",
    api_key="unused",
    max_retries=3,
    default_headers={"X-Wharf-Start": "never"},
    http_client=openai.DefaultHttpxClient(
        event_hooks={"response": [load_after_the_first_refusal]}, timeout=60
    ),
)
raw = patient.chat.completions.with_raw_response.create(model=model, **ask)
assert [status for status, _, _ in seen] == [503, 200] and raw.retries_taken == 1, seen
waited, told = seen[1][1] - seen[0][1], int(seen[0][2])
assert told >= 1 and waited >= told - 0.05, (waited, told)
print(f"Retry-After: {told} s were told, {waited:.1f} s waited, then 200")


def refused(error, key, **request):
    keyed_client = openai.OpenAI(base_url=f"{keyed}/v1", api_key=key, max_retries=0, timeout=60)
    try:
        keyed_client.chat.completions.create(**{**ask, "model": "ada", **request})
    except error as raised:
        print(f"{error.__name__}: {raised.message[:100]}")
        return raised
    sys.exit(f"expected {error.__name__} for {key}")


refused(openai.AuthenticationError, "key-of-nobody-00001")
refused(openai.PermissionDeniedError, "key-of-a-reader-001")
refused(openai.PermissionDeniedError, "key-of-ada-only-001", model="bob")
limited = openai.OpenAI(base_url=f"{keyed}/v1", api_key="key-with-a-limit-001", max_retries=0)
limited.chat.completions.create(model="ada", **ask)
error = refused(openai.RateLimitError, "key-with-a-limit-001")
assert int(error.response.headers["retry-after"]) >= 1, error.response.headers
names = [entry.id for entry in openai.OpenAI(
    base_url=f"{keyed}/v1", api_key="key-of-ada-only-001").models.list()]
assert names == ["ada"], names
print("keys: ok")
