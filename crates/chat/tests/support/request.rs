//! Conversations from requests in the API's form.

use ctxserve_chat::{Conversation, FunctionTool, Message, ToolCall};
use serde_json::Value;

fn text(value: &Value, key: &str) -> Option<String> {
    value[key].as_str().map(str::to_owned)
}

fn call(value: &Value) -> ToolCall {
    let function = &value["function"];
    ToolCall {
        id: text(value, "id").unwrap(),
        name: text(function, "name").unwrap(),
        arguments: text(function, "arguments").unwrap(),
    }
}

fn message(value: &Value) -> Message {
    let content = text(value, "content");
    match value["role"].as_str().unwrap() {
        "system" => Message::System(content.unwrap()),
        "developer" => Message::Developer(content.unwrap()),
        "user" => Message::User { name: text(value, "name"), content: content.unwrap() },
        "assistant" => Message::Assistant {
            reasoning: text(value, "reasoning_content"),
            content,
            tool_calls: value["tool_calls"].as_array().into_iter().flatten().map(call).collect(),
        },
        "tool" => Message::Tool { call_id: text(value, "tool_call_id").unwrap(), content: content.unwrap() },
        other => panic!("{other}"),
    }
}

/// `request`: its messages and template arguments. `tools`: each declaration's JSON, as the client wrote it.
pub(crate) fn conversation(request: &Value, tools: &[String]) -> Conversation {
    let tool = |declaration: &String| FunctionTool {
        name: "unused".to_owned(),
        description: None,
        parameters: None,
        declaration: Some(declaration.clone()),
    };
    Conversation {
        messages: request["messages"].as_array().unwrap().iter().map(message).collect(),
        tools: tools.iter().map(tool).collect(),
        thinking: request["enable_thinking"].as_bool(),
        ..Conversation::default()
    }
}
