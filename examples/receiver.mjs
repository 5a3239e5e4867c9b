// Keeps gpt-worker's webhooks in a directory: PORT=8000 node receiver.mjs
import { mkdir, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { Webhook } from "standardwebhooks";

const webhook = new Webhook(process.env.WEBHOOK_SECRET);
const inbox = process.env.INBOX ?? "inbox";
await mkdir(inbox, { recursive: true });

async function receive(request) {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  const body = Buffer.concat(chunks).toString();
  try {
    webhook.verify(body, request.headers);
  } catch {
    return 401;
  }
  // The id is the same on every attempt: a message that comes twice is kept once.
  await writeFile(`${inbox}/${request.headers["webhook-id"]}.json`, body);
  return 204;
}

createServer(async (request, response) => {
  const status = await receive(request).catch(() => 500);
  response.writeHead(status).end();
}).listen(process.env.PORT, "127.0.0.1");
