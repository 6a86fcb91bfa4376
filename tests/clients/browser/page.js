// What two clients get in a browser from a server of another origin: bundled by test_browser.py, which reads the result.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import OpenAI from "openai";

const { server, key, model } = Object.fromEntries(new URLSearchParams(location.search));
const asked = { model, prompt: "hello", max_tokens: 9, temperature: 0 };
const results = {};

async function noted(name, act) {
  try {
    results[name] = await act();
  } catch (error) {
    results[name] = `${error.constructor.name}: ${error.message}`;
  }
}

const openai = (apiKey) =>
  new OpenAI({ baseURL: `${server}/v1`, apiKey, dangerouslyAllowBrowser: true, maxRetries: 0 });
const aiSdk = createOpenAICompatible({ name: "millstream", baseURL: `${server}/v1`, apiKey: key });

await noted("openai models", async () => (await openai(key).models.list()).data.map((card) => card.id));
await noted("openai", async () => {
  const { data, request_id } = await openai(key).completions.create(asked).withResponse();
  return { text: data.choices[0].text, request_id };
});
await noted("openai stream", async () => {
  let text = "";
  const options = { stream: true, stream_options: { include_usage: true, include_obfuscation: true } };
  for await (const chunk of await openai(key).completions.create({ ...asked, ...options })) {
    text += chunk.choices[0]?.text ?? "";
  }
  return text;
});
await noted("openai wrong key", () => openai("wrong").completions.create(asked));
const ofAiSdk = { model: aiSdk.completionModel(model), prompt: "hello", maxOutputTokens: 9, maxRetries: 0 };
await noted("ai-sdk", async () => (await generateText(ofAiSdk)).text.length);
await noted("ai-sdk stream", async () => {
  let pieces = 0;
  for await (const piece of streamText(ofAiSdk).textStream) pieces += piece.length;
  return pieces;
});

await fetch("/results", { method: "POST", body: JSON.stringify(results) });
