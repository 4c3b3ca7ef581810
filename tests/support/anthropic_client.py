"""The official client of Anthropic's API against a running gateway: anthropic_client.py URL KEY"""

import sys

import anthropic

url, key = sys.argv[1:]
# It sends `x-api-key`, as it does to Anthropic.
client = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=60)
ask = {"max_tokens": 8, "messages": [{"role": "user", "content": "who are you?"}]}

for name in ("ada", "bob"):
    reply = client.messages.create(model=name, **ask)
    assert reply.type == "message" and reply.role == "assistant", reply
    assert reply.content[0].text.strip().startswith(f"{name}-1"), reply
    assert reply.usage.output_tokens > 0 and reply.usage.input_tokens > 0, reply.usage
    assert reply.stop_reason in ("max_tokens", "end_turn"), reply
    print(f"{name}:", reply.content[0].text.strip()[:30])

with client.messages.stream(model="ada", **ask) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
assert text.strip().startswith("ada-1"), text
assert final.usage.output_tokens > 0 and final.content[0].text == text, final
print("streamed:", text.strip()[:30])

counted = client.messages.count_tokens(model="ada", messages=ask["messages"])
assert counted.input_tokens > 0, counted
print("count_tokens:", counted.input_tokens)

bearer = anthropic.Anthropic(base_url=url, auth_token=key, max_retries=0, timeout=60)
assert bearer.messages.create(model="ada", **ask).content


def expect(error, api_key=key, **request):
    one = anthropic.Anthropic(base_url=url, api_key=api_key, max_retries=0, timeout=60)
    try:
        one.messages.create(**{**ask, "model": "ada", **request})
    except error as raised:
        print(f"{error.__name__}: {raised.message[:120]}")
        return raised
    sys.exit(f"expected {error.__name__} from {request}")


missing = expect(anthropic.NotFoundError, model="adax")
assert missing.body["error"]["code"] == "model_not_found", missing.body
expect(anthropic.AuthenticationError, api_key="key-of-nobody-00001")
expect(anthropic.BadRequestError, model="")
failed = expect(anthropic.InternalServerError, model="broken")
assert failed.status_code == 503 and failed.response.headers["retry-after"], failed
try:
    with client.messages.stream(model="broken", **ask) as stream:
        list(stream.text_stream)
    sys.exit("expected an error from the stream")
except anthropic.APIStatusError as raised:
    print(f"{type(raised).__name__}, streamed: {raised.message[:80]}")
print("typed exceptions: ok")
