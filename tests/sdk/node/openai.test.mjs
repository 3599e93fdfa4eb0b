// The official Node SDK, unmodified, against the real binary.
import assert from "node:assert/strict";
import { mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";

import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

import { start } from "./server.mjs";

const model = "p1_packed";
const messages = [{ role: "system", content: "You are brief." }, { role: "user", content: "Say something." }];
const greedy = { model, messages, temperature: 0, max_tokens: 24 };
const long = { model, messages, max_tokens: 3900, seed: 5, ignore_eos: true, cache_prompt: false };

const servers = [];
let server, client;

async function serve(...args) {
  servers.push(await start(...args));
  return servers.at(-1);
}
const connect = (to, settings = {}) => new OpenAI({ baseURL: `${to.url}/v1`, apiKey: "unused", maxRetries: 0, ...settings });
const gather = async (stream) => { const all = []; for await (const one of stream) all.push(one); return all; };
const file = (text) => { const path = join(mkdtempSync(join(tmpdir(), "bitnet-")), "file"); writeFileSync(path, text); return path; };

before(async () => { server = await serve(); client = connect(server); });
after(() => servers.forEach((one) => one.stop()));

/** Waits until nothing runs: a generous guard, not a measurement. */
async function idle() {
  for (let i = 0; i < 400; i++) {
    const text = await (await fetch(`${server.url}/metrics`)).text();
    const busy = text.split("\n").filter((line) => /^bitnet_requests_(running|waiting)\{/.test(line) && !line.endsWith(" 0"));
    if (busy.length === 0) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  assert.fail("the engine is still at work");
}

test("models, with a slash in the name too", async () => {
  assert.deepEqual((await gather(client.models.list())).map((one) => one.id), [model]);
  assert.equal((await client.models.retrieve(model)).object, "model");
  const slashed = connect(await serve("--model-name", "microsoft/bitnet"));
  assert.equal((await slashed.models.retrieve("microsoft/bitnet")).id, "microsoft/bitnet");
});

test("a whole chat answer", async () => {
  const answer = await client.chat.completions.create(greedy);
  assert.match(answer.id, /^chatcmpl-/);
  assert.equal(answer.object, "chat.completion");
  const [choice] = answer.choices;
  assert.equal(choice.message.role, "assistant");
  assert.equal(typeof choice.message.content, "string");
  assert.equal(choice.message.refusal, null);
  assert.ok(["stop", "length"].includes(choice.finish_reason));
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  assert.ok(answer._request_id);
});

test("a stream equals the whole", async () => {
  const whole = await client.chat.completions.create(greedy);
  const chunks = await gather(await client.chat.completions.create({ ...greedy, stream: true, stream_options: { include_usage: true } }));
  assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), whole.choices[0].message.content);
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.equal(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
  assert.equal(new Set(chunks.map((chunk) => chunk.id)).size, 1);
  assert.equal(chunks.filter((chunk) => chunk.choices[0]?.delta.role).length, 1);
});

test("the stream helper, with several choices", async () => {
  const stream = client.chat.completions.stream({ model, messages, n: 3, seed: 7, max_tokens: 8 });
  const seen = [];
  stream.on("content", (delta, snapshot) => seen.push([delta, snapshot]));
  const final = await stream.finalChatCompletion();
  assert.deepEqual(final.choices.map((choice) => choice.index), [0, 1, 2]);
  assert.ok(final.choices.every((choice) => choice.message.role === "assistant" && choice.finish_reason));
  assert.ok(seen.length > 0);
});

test("a choice is the same for the same seed", async () => {
  const ask = () => client.chat.completions.create({ model, messages, n: 4, seed: 11, max_tokens: 12, ignore_eos: true });
  const texts = async () => (await ask()).choices.map((choice) => choice.message.content);
  const [first, second] = [await texts(), await texts()];
  assert.deepEqual(first, second);
  assert.ok(new Set(first).size > 1);
});

test("logprobs", async () => {
  const answer = await client.chat.completions.create({ ...greedy, logprobs: true, top_logprobs: 5 });
  const entries = answer.choices[0].logprobs.content;
  assert.equal(entries.length, answer.usage.completion_tokens);
  for (const entry of entries) {
    assert.equal(entry.top_logprobs.length, 5);
    assert.equal(entry.logprob, Math.max(...entry.top_logprobs.map((top) => top.logprob)));
  }
});

test("completions in every form of prompt", async () => {
  const answer = await client.completions.create({ model, prompt: ["One", "Two"], n: 2, max_tokens: 5, seed: 1 });
  assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1, 2, 3]);
  assert.equal((await client.completions.create({ model, prompt: [500, 69, 198], max_tokens: 3 })).usage.prompt_tokens, 3);
  assert.equal((await client.completions.create({ model, prompt: [[500, 69], [500, 83]], max_tokens: 1 })).choices.length, 2);
  const echo = await client.completions.create({ model, prompt: "Hello world", max_tokens: 0, echo: true, logprobs: 2 });
  assert.equal(echo.choices[0].text, "Hello world");
  assert.equal(echo.choices[0].logprobs.token_logprobs[0], null);
  const chunks = await gather(await client.completions.create({ model, prompt: "Hello", max_tokens: 9, temperature: 0, stream: true }));
  const whole = await client.completions.create({ model, prompt: "Hello", max_tokens: 9, temperature: 0 });
  assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), whole.choices[0].text);
});

const Plan = z.object({ steps: z.array(z.object({ kind: z.enum(["add", "multiply"]), value: z.number().int() })).min(1).max(2), note: z.enum(["fine", "odd"]).nullable() });

test("parse gives what the schema says, streamed too", async () => {
  const response_format = zodResponseFormat(Plan, "plan");
  for (let seed = 0; seed < 3; seed++) {
    const answer = await client.chat.completions.parse({ model, messages, response_format, seed, temperature: 1.5, max_tokens: 300, logit_bias: {} });
    if (answer.choices[0].finish_reason === "stop") Plan.parse(answer.choices[0].message.parsed);
  }
  const stream = client.chat.completions.stream({ model, messages, response_format, seed: 1, max_tokens: 400 });
  const final = await stream.finalChatCompletion();
  Plan.parse(final.choices[0].message.parsed);
  await assert.rejects(client.chat.completions.parse({ model, messages, response_format, max_tokens: 3 }), OpenAI.LengthFinishReasonError ?? Error);
});

test("tools: called, streamed, and run in a loop", async () => {
  const parameters = z.object({ city: z.enum(["Rome", "Oslo"]), days: z.number().int().min(1).max(9) });
  const tools = [zodFunction({ name: "get_weather", parameters })];
  const body = { model, messages, tools, tool_choice: "required", parallel_tool_calls: false, seed: 2, max_tokens: 300 };
  const answer = await client.chat.completions.parse(body);
  const [call] = answer.choices[0].message.tool_calls;
  assert.equal(answer.choices[0].finish_reason, "tool_calls");
  assert.equal(answer.choices[0].message.content, null);
  parameters.parse(call.function.parsed_arguments);
  assert.match(call.id, /^call_/);

  const final = await client.chat.completions.stream(body).finalChatCompletion();
  assert.equal(final.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
  assert.equal(final.choices[0].message.tool_calls[0].function.name, "get_weather");

  const run = { type: "function", function: { name: "get_weather", parse: JSON.parse, parameters: tools[0].function.parameters, function: ({ city }) => `12 degrees in ${city}` } };
  const runner = client.chat.completions.runTools({ model, messages, tools: [run], tool_choice: { type: "function", function: { name: "get_weather" } }, parallel_tool_calls: false, seed: 2, max_tokens: 300 });
  assert.match(await runner.finalFunctionToolCallResult(), /^12 degrees in (Rome|Oslo)$/);
});

test("errors by class, each with its id", async () => {
  const refused = async (body, kind) => {
    try { await client.chat.completions.create({ ...greedy, ...body }); } catch (error) {
      assert.ok(error instanceof kind, String(error));
      assert.ok(error.requestID);
      return error;
    }
    return assert.fail("it was not refused");
  };
  for (const [param, value] of Object.entries({ temperature: 3, top_p: -1, n: 0, max_tokens: 0, top_logprobs: 3, messages: [], logit_bias: { 99999: 1 }, stop: ["a", "b", "c", "d", "e"], seed: "x", frequency_penalty: 2.5 })) {
    const error = await refused({ [param]: value }, OpenAI.BadRequestError);
    assert.equal(error.param, param);
    assert.equal(error.type, "invalid_request_error");
    assert.equal(typeof error.code, "string");
  }
  assert.equal((await refused({ model: "nope" }, OpenAI.NotFoundError)).code, "model_not_found");
  assert.equal((await refused({ messages: [{ role: "user", content: "word ".repeat(9000) }] }, OpenAI.BadRequestError)).code, "context_length_exceeded");
  await assert.rejects(client.post("/nowhere", { body: {} }), OpenAI.NotFoundError);
  const guarded = await serve("--api-key-file", file("team:secret-1\n"));
  await assert.rejects(gather(connect(guarded).models.list()), (error) => error instanceof OpenAI.AuthenticationError && error.code === "invalid_api_key");
  assert.equal((await connect(guarded, { apiKey: "secret-1" }).models.list()).data.length, 1);
});

test("the caller's own limit is waited out", async () => {
  const limited = await serve("--rate-limit-rpm", "60");
  const impatient = connect(limited);
  let refused;
  for (let i = 0; i < 70 && !refused; i++) await impatient.models.list().catch((error) => { refused = error; });
  assert.ok(refused instanceof OpenAI.RateLimitError);
  assert.equal(refused.code, "rate_limit_exceeded");
  assert.ok(Number(refused.headers.get("retry-after")) >= 1);
  assert.equal((await connect(limited, { maxRetries: 5 }).models.list()).data.length, 1);
});

test("a full queue is waited out", async () => {
  const small = await serve("--max-num-seqs", "1", "--max-queue", "1", "--kernel", "scalar");
  const streams = [];
  let refused;
  for (let seed = 0; seed < 20 && !refused; seed++) {
    await connect(small).chat.completions.create({ ...long, seed, stream: true }).then((stream) => streams.push(stream), (error) => { refused = error; });
  }
  assert.ok(refused instanceof OpenAI.InternalServerError, String(refused));
  assert.equal(refused.status, 503);
  assert.equal(refused.code, "server_overloaded");
  setTimeout(() => streams.forEach((stream) => stream.controller.abort()), 300);
  const answer = await connect(small, { maxRetries: 8 }).chat.completions.create({ ...long, seed: 99, max_tokens: 1 });
  assert.equal(answer.usage.completion_tokens, 1);
});

test("timeouts and aborts free the engine", async () => {
  await assert.rejects(connect(server, { timeout: 100 }).chat.completions.create(long), OpenAI.APIConnectionTimeoutError);
  await idle();
  const stream = await client.chat.completions.create({ ...long, stream: true });
  for await (const _ of stream) break;
  await idle();
  const controller = new AbortController();
  setTimeout(() => controller.abort(), 100);
  await assert.rejects(client.chat.completions.create(long, { signal: controller.signal }), OpenAI.APIUserAbortError);
  await idle();
});

test("an error in mid-stream is an error", async () => {
  const hurried = await serve("--request-timeout", "1", "--kernel", "scalar");
  const reading = async () => gather(await connect(hurried, { maxRetries: 2 }).chat.completions.create({ ...long, n: 8, stream: true }));
  await assert.rejects(reading(), OpenAI.APIError);
});

test("many at once, each with its own answer", async () => {
  const ask = (seed) => client.chat.completions.create({ model, messages, seed, max_tokens: 10, ignore_eos: true, cache_prompt: false });
  const alone = [];
  for (let seed = 0; seed < 8; seed++) alone.push((await ask(seed)).choices[0].message.content);
  const crowd = await Promise.all(Array.from({ length: 8 }, (_, seed) => ask(seed)));
  assert.deepEqual(crowd.map((answer) => answer.choices[0].message.content), alone);
});
