"""FastContext as its card serves it, and arguments of its template."""

from conftest import QWEN, QWEN_TOKENIZER
from server import Server, run

CARD = """--quantization modelopt --tensor-parallel-size 1 --trust-remote-code --dtype auto --kv-cache-dtype fp8
    --attention-backend flashinfer --gpu-memory-utilization 0.40 --max-model-len 131072 --max-num-seqs 16
    --enable-chunked-prefill --enable-auto-tool-choice --tool-call-parser hermes"""


def test_the_command_line_of_the_model_card(tmp_path):
    """FastContext's card serves its checkpoint so: a directory with everything in it, in the client's own requests."""
    for file in QWEN.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(QWEN_TOKENIZER.read_bytes())
    with Server(tmp_path, *CARD.split(), "--served-model-name", "FastContext-1.0-4B-RL") as server:
        client = server.client()
        models = client.models.list().data
        assert [(model.id, model.model_extra["max_model_len"]) for model in models] == [("FastContext-1.0-4B-RL", 131072)]
        tools = [
            {"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object", "properties": {"-n": {}}}}}
            for name in ("Read", "Glob", "Grep")
        ]
        messages = [
            {"role": "system", "content": "Workspace Path:/a"},
            {"role": "user", "content": "Where is it?"},
            {"role": "assistant", "tool_call_id": "c1", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"arguments": "{\"-n\": true}", "name": "Grep"}}]},
            {"role": "tool", "content": "<|im_end|>", "tool_call_id": "c1"},
        ]
        for more in ({}, {"tool_choice": "none"}, {"reasoning_effort": "none"}):
            answer = client.chat.completions.create(
                model="FastContext-1.0-4B-RL", messages=messages, tools=tools, max_completion_tokens=24, temperature=0.7, top_p=0.95, **more
            )
            assert len(answer.choices) == 1 and answer.choices[0].message.role == "assistant"
            assert answer.usage.completion_tokens > 0 and answer.usage.prompt_tokens > 100
            assert isinstance(answer.choices[0].message.content, str) or answer.choices[0].message.tool_calls
        frames = list(client.chat.completions.create(
            model="FastContext-1.0-4B-RL", messages=messages, tools=tools, max_completion_tokens=8, stream=True,
            stream_options={"include_usage": True},
        ))
        assert frames[-1].choices == [] and frames[-1].usage.completion_tokens > 0


def test_arguments_of_the_template(tmp_path):
    """The operator's beneath a request's; what the template does not read is refused, at the start too."""
    template = tmp_path / "t.jinja"
    template.write_text("<|im_start|>user\n{{ style | default('none') }} {{ enable_thinking | default('unset') }}<|im_end|>\n")
    model = ["--model", QWEN, "--tokenizer", QWEN_TOKENIZER, "--chat-template", template]
    with Server(*model, "--default-chat-template-kwargs", '{"style": "brief", "enable_thinking": false}') as server:
        def prompt(**kwargs):
            body = {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": False, **kwargs}
            ids = server.post("/tokenize", body)[2]["tokens"]
            return server.post("/detokenize", {"tokens": ids})[2]["prompt"]

        assert "brief False" in prompt()
        assert "long True" in prompt(chat_template_kwargs={"style": "long", "enable_thinking": True})
        status, _, refused = server.post("/tokenize", {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"tone": 1}})
        assert status == 400 and "tone" in refused["error"]["message"]
    done = run("serve", *model, "--port", 0, "--default-chat-template-kwargs", '{"tone": 1}')
    assert done.returncode != 0 and "--default-chat-template-kwargs" in done.stderr and "tone" in done.stderr, done.stderr
