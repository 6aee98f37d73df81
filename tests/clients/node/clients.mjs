// JavaScript clients of the server: node clients.mjs CLIENT ask|loop URL [whole|streamed]
//
// `loop` runs the tool loop: each search is a line of JSON on standard output and is answered by a line on standard input.
// The last line is {"said": TEXT}, or {"error": TEXT} with all that a user of the client sees of it.

import { createInterface } from "node:readline/promises";

const [client, action, url, streamed] = process.argv.slice(2);
const stream = streamed === "streamed";
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const name = "search";
const description = "Searches.";
const parameters = {
  type: "object",
  properties: { query: { type: "string" } },
  required: ["query"],
  additionalProperties: false,
};
const MOST = 25;

async function search({ query }) {
  console.log(JSON.stringify({ query }));
  return JSON.parse((await lines.next()).value).result;
}

async function sdk(Client) {
  const { default: OpenAI } = await import("openai");
  return new (Client ?? OpenAI)({ baseURL: url, apiKey: "none", maxRetries: 0 });
}

const clients = {
  "openai-node chat": {
    async ask(prompt) {
      const openai = await sdk();
      await openai.chat.completions.create({ model: "m", messages: [{ role: "user", content: prompt }] });
    },
    async loop() {
      const openai = await sdk();
      const messages = [{ role: "user", content: "Search." }];
      const tools = [{ type: "function", function: { name, description, parameters } }];
      for (let turn = 0; turn < MOST; turn++) {
        const asked = { model: "m", messages, tools };
        const answer = stream
          ? await openai.chat.completions.stream(asked).finalChatCompletion()
          : await openai.chat.completions.create(asked);
        const { message } = answer.choices[0];
        messages.push(message);
        if (!message.tool_calls?.length) return message.content;
        for (const call of message.tool_calls) {
          const content = await search(JSON.parse(call.function.arguments));
          messages.push({ role: "tool", tool_call_id: call.id, content });
        }
      }
    },
  },
  "openai-node responses": {
    async ask(prompt) {
      const openai = await sdk();
      await openai.responses.create({ model: "m", input: prompt });
    },
    async loop() {
      const openai = await sdk();
      const tools = [{ type: "function", name, description, parameters, strict: false }];
      let input = "Search.";
      for (let turn = 0; turn < MOST; turn++) {
        // What a server remembers is gone when it restarts, so all of it is sent again.
        const asked = { model: "m", input, tools, store: false };
        let response;
        if (stream) {
          for await (const event of await openai.responses.create({ ...asked, stream: true })) {
            if (event.type === "response.completed") response = event.response;
          }
        } else {
          response = await openai.responses.create(asked);
        }
        const items = typeof input === "string" ? [{ role: "user", content: input }] : input;
        input = [...items, ...response.output];
        const calls = response.output.filter((item) => item.type === "function_call");
        if (!calls.length) return response.output.flatMap((item) => (item.type === "message" ? item.content : [])).map((part) => part.text).join("");
        for (const call of calls) {
          const output = await search(JSON.parse(call.arguments));
          input.push({ type: "function_call_output", call_id: call.call_id, output });
        }
      }
    },
  },
  "ai-sdk chat": vercel((provider) => provider.chat("m")),
  "ai-sdk responses": vercel((provider) => provider.responses("m")),
  "ai-sdk compatible": {
    async ask(prompt) {
      await vercel(null).ask(prompt, await compatible());
    },
    async loop() {
      return vercel(null).loop(await compatible());
    },
  },
  "agents-js chat": agents("OpenAIChatCompletionsModel"),
  "agents-js responses": agents("OpenAIResponsesModel"),
};

async function compatible() {
  const { createOpenAICompatible } = await import("@ai-sdk/openai-compatible");
  return createOpenAICompatible({ name: "local", baseURL: url, apiKey: "none" }).chatModel("m");
}

// Vercel's AI SDK, with one of its models.
function vercel(choose) {
  const model = async () => {
    const { createOpenAI } = await import("@ai-sdk/openai");
    return choose(createOpenAI({ baseURL: url, apiKey: "none" }));
  };
  return {
    async ask(prompt, given) {
      const { generateText } = await import("ai");
      await generateText({ model: given ?? (await model()), prompt, maxRetries: 0 });
    },
    async loop(given) {
      const { generateText, streamText, tool, jsonSchema, stepCountIs } = await import("ai");
      const tools = { search: tool({ description, inputSchema: jsonSchema(parameters), execute: search }) };
      const asked = { model: given ?? (await model()), tools, prompt: "Search.", stopWhen: stepCountIs(MOST), maxRetries: 0 };
      if (!stream) return (await generateText(asked)).text;
      const errors = [];
      const result = streamText({ ...asked, onError: ({ error }) => errors.push(error) });
      const text = await result.text;
      if (errors.length) throw errors[0];
      return text;
    },
  };
}

// OpenAI's Agents SDK, with one of its models.
function agents(kind) {
  const agent = async (tools) => {
    const sdkOfAgents = await import("@openai/agents");
    sdkOfAgents.setTracingDisabled(true);
    const { Agent, run } = sdkOfAgents;
    const model = new sdkOfAgents[kind](await sdk(), "m");
    return [new Agent({ name: "a", instructions: "Search.", model, tools: tools(sdkOfAgents.tool) }), run];
  };
  return {
    async ask(prompt) {
      const [one, run] = await agent(() => []);
      await run(one, prompt);
    },
    async loop() {
      const [one, run] = await agent((tool) => [tool({ name, description, parameters, strict: false, execute: search })]);
      const result = await run(one, "Search.", { maxTurns: MOST, stream });
      if (stream) {
        for await (const _ of result);
        await result.completed;
      }
      return result.finalOutput;
    },
  };
}

// All that an error and its causes say.
function told(error) {
  const own = [error?.name, error?.message, error?.status, error?.statusCode, error?.code, error?.responseBody];
  const words = own.filter((word) => word !== undefined).join(" ");
  return error?.cause ? `${words}\n${told(error.cause)}` : words;
}

try {
  const chosen = clients[client];
  const said = action === "ask" ? await chosen.ask(JSON.parse((await lines.next()).value)) : await chosen.loop();
  console.log(JSON.stringify({ said: said ?? null }));
} catch (error) {
  console.log(JSON.stringify({ error: told(error) }));
}
process.exit(0);
