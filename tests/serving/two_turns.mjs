// A streaming conversation of two turns with nothing but Node; prints the answers as JSON.
const [url, model] = process.argv.slice(2);
const messages = [];
for (const question of ["hello", "and?"]) {
  messages.push({ role: "user", content: question });
  const response = await fetch(`${url}/v1/chat/completions`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model, messages, seed: 3, max_tokens: 12, stream: true }),
  });
  let received = "";
  for await (const part of response.body.pipeThrough(new TextDecoderStream())) received += part;
  const events = received.split("\n\n").map((event) => event.slice("data: ".length));
  if (events.at(-2) !== "[DONE]") throw new Error(received);
  const pieces = events.slice(0, -2).map((event) => JSON.parse(event).choices[0].delta.content ?? "");
  messages.push({ role: "assistant", content: pieces.join("") });
}
console.log(JSON.stringify(messages.filter((turn) => turn.role === "assistant").map((turn) => turn.content)));
