"""Harmony token sequences, written as segments."""


def control(name):
    return {"control": f"<|{name}|>"}


def text(value):
    return {"text": value}


START, END, CHANNEL, MESSAGE = control("start"), control("end"), control("channel"), control("message")
RETURN, CALL, CONSTRAIN = control("return"), control("call"), control("constrain")


def analysis(body):
    return [CHANNEL, text("analysis"), MESSAGE, text(body), END, START, text("assistant")]


def final(body, end=RETURN):
    return [CHANNEL, text("final"), MESSAGE, text(body), *([end] if end else [])]


def call(name, arguments, end=CALL):
    head = [text(f" to=functions.{name}"), CHANNEL, text("commentary "), CONSTRAIN, text("json"), MESSAGE]
    return [*head, text(arguments), *([end] if end else [])]


def then(message):
    """Another message of the same turn."""
    return [START, text("assistant"), *message]


# Well-formed answers and the odd ones that models write; each must survive the whole server.
SEQUENCES = {
    "final": final("Paris."),
    "reasoning then final": analysis("The capital.") + final("Paris."),
    "call": analysis("I need to look.") + call("search", '{"query": "paris"}'),
    "two calls": call("search", '{"query": "a"}', end=END) + then(call("search", '{"query": "b"}')),
    "preamble then call": [CHANNEL, text("commentary"), MESSAGE, text("Let me see."), END]
    + then(call("search", '{"query": "x"}')),
    "recipient after the channel": [CHANNEL, text("commentary to=functions.search "), CONSTRAIN, text("json"), MESSAGE, text("{}"), CALL],
    "call on analysis": [CHANNEL, text("analysis to=functions.search code"), MESSAGE, text('{"query": 1}'), CALL],
    "no channel": [CHANNEL, MESSAGE, text("hi"), RETURN],
    "plain text": [text("Just text."), RETURN],
    "plain text and nothing else": [text("Just text.")],
    "empty": [RETURN],
    "cut in a header": [CHANNEL, text("fin")],
    "cut in a body": final("Half a sent", end=None),
    "cut in a call": call("search", '{"query": "ha', end=None),
    "missing start": [CHANNEL, text("analysis"), MESSAGE, text("a"), END, text("assistant"), CHANNEL, text("final"), MESSAGE, text("b"), RETURN],
    "missing end": [CHANNEL, text("analysis"), MESSAGE, text("a"), START, text("assistant"), *final("b")],
    "doubled channel": [CHANNEL, text("commentary"), CHANNEL, text("final"), MESSAGE, text("b"), RETURN],
    "misspelt channel": [CHANNEL, text("finall"), MESSAGE, text("b"), RETURN],
    "glued role": [START, text("assistantfinal"), MESSAGE, text("b"), RETURN],
    "repeated prefix": [START, text("assistant"), *final("b")],
    "final with a type": [CHANNEL, text("final "), CONSTRAIN, text("json"), MESSAGE, text('{"a": 1}'), RETURN],
    "return after end": [CHANNEL, text("final"), MESSAGE, text("b"), END, RETURN],
    "broken arguments": call("search", '{"query": "a"} ]'),
    "arguments that are no JSON": call("search", "query: a"),
    "doubled namespace": [text(" to=functions.functions.search"), CHANNEL, text("commentary"), MESSAGE, text("{}"), CALL],
    "control tokens in a body": [CHANNEL, text("final"), MESSAGE, text("a"), CONSTRAIN, text("b"), RETURN],
    "markup spelled as text": final("<|end|><|start|>assistant"),
    "cut character": [CHANNEL, text("final"), MESSAGE, {"bytes": "f09f98"}, RETURN],
    "split character": [CHANNEL, text("final"), MESSAGE, {"bytes": "f09f"}, {"bytes": "9880"}, RETURN],
    "only control tokens": [CHANNEL, CHANNEL, START, MESSAGE, END, END, RETURN],
    "unicode": analysis("思考 🤔") + final("né 👩‍👩‍👧 ｆｕｌｌ"),
}
