// OpenAI's package for Node: a completion, a stream, a saved state that is continued, an error.
//
//     cd clients/examples && npm install && node openai_node.mjs
//
// OPENAI_BASE_URL and OPENAI_API_KEY name another server and its key.
import OpenAI from "openai";

const client = new OpenAI({
  baseURL: process.env.OPENAI_BASE_URL ?? "http://127.0.0.1:8000/v1",
  apiKey: process.env.OPENAI_API_KEY ?? "none",
});
const model = (await client.models.list()).data[0].id;
const prompt = "The old man looked at the sea and";

console.log(`# ${model}: a completion`);
const answer = await client.completions.create({ model, prompt, max_tokens: 32, temperature: 0 });
console.log(prompt + answer.choices[0].text, answer.usage);

console.log("\n# A stream");
const stream = await client.completions.create({ model, prompt, max_tokens: 48, temperature: 0.8, seed: 2, stream: true });
for await (const chunk of stream) process.stdout.write(chunk.choices[0].text);

// Fields that are not OpenAI's own go beside the others; routes that are not go through client.post and its like.
console.log("\n\n# A state, saved under a name and continued without reading the text again");
const saved = await client.completions.create({ model, prompt, max_tokens: 16, temperature: 0, save_state: "sea" });
console.log(saved.choices[0].text, saved.state);
const more = await client.completions.create({ model, prompt: "", state: "sea", max_tokens: 16, temperature: 0 });
console.log(more.choices[0].text, more.usage);
console.log(await client.delete("/states/sea"));

console.log("\n# What cannot be is refused, by the name of the field");
try {
  await client.completions.create({ model, prompt, temperature: -1 });
} catch (error) {
  if (!(error instanceof OpenAI.BadRequestError)) throw error;
  console.log(`${error.status}, ${error.param}: ${error.message}`);
}
