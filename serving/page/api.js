// The server's interface. Every fault becomes an ApiError whose message says in plain words what to do.
import { t } from "./language.js";
import { readEvents } from "./sse.js";

export class ApiError extends Error {
  constructor(message, kind = "server") {
    super(message);
    this.kind = kind;
  }
}

const UNREACHABLE =
  t("The server cannot be reached. It may have stopped, or the network is down. Start it again, then retry.");

async function request(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(error instanceof TypeError && /header/i.test(error.message) ? badKey(true) : UNREACHABLE, "network");
  }
  if (!response.ok) throw await refusal(response, key);
  return response;
}

const badKey = (given) =>
  given ? t("The server does not accept this API key.") : t("This server wants an API key.");

async function refusal(response, key) {
  let detail = "";
  let code = "";
  try {
    const body = await response.json();
    detail = String(body?.error?.message ?? body?.detail ?? "").slice(0, 1000);
    code = body?.error?.code;
  } catch {
    // No JSON: the status alone has to do.
  }
  const status = response.status;
  if (status === 404 && code === "model_not_found") return new ApiError(t("The server no longer has this model. {detail}", { detail }), "model");
  if (status === 401) return new ApiError(badKey(Boolean(key)), "key");
  if (code === "closing") return new ApiError(t("The server is shutting down. Start it again, then retry."), "network");
  if (status === 408 || status === 504) {
    const fix = detail || t("Retry, or ask for a shorter answer.");
    return new ApiError(t("The request took too long ({status}). {fix}", { status, fix }));
  }
  if (status === 429 || status === 503) {
    const wait = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
    const later = wait === 1 ? t("The server is busy. Retry in 1 second.") : t("The server is busy. Retry in {wait} seconds.", { wait });
    return new ApiError(wait > 0 ? later : t("The server is busy. Retry in a moment."), "busy");
  }
  if (status === 413) return new ApiError(t("The conversation is too long for the server. {detail}", { detail }), "request");
  if (status >= 500) {
    return new ApiError(t("The server failed ({status}). {why}", { status, why: detail || t("Its log says why.") }));
  }
  const refused = detail ? t("The server refused: {detail}", { detail }) : t("The server refused the request ({status}).", { status });
  return new ApiError(refused, "request");
}

export async function listModels(key) {
  const response = await request("/v1/models", key);
  const body = await response.json().catch(() => null);
  if (!Array.isArray(body?.data)) throw new ApiError(t("The server's list of models cannot be read."));
  return body.data.map(({ id, has_thinking }) => ({ id: String(id), hasThinking: has_thinking === true }));
}

// Yields {thinking}, {content}, {call: {index, id, name, arguments}}, {finish} and {usage}, as they arrive.
export async function* streamAnswer(body, key, signal) {
  const response = await request("/v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let finished = false;
  try {
    for await (const data of readEvents(response.body)) {
      if (data === "[DONE]") break;
      for (const event of eventsOf(data)) {
        finished ||= "finish" in event;
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    if (finished) return;
    throw new ApiError(t("The connection to the server broke in the middle of the answer."), "network");
  }
  if (!finished) throw new ApiError(t("The server ended the answer before it was complete."), "network");
}

function* eventsOf(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ApiError(t("The server sent something that is no answer."));
  }
  if (chunk?.error) {
    const why = String(chunk.error.message ?? t("it does not say why"));
    throw new ApiError(t("The server ended the answer: {why}", { why }));
  }
  const choice = chunk?.choices?.[0];
  const delta = choice?.delta ?? {};
  if (typeof delta.reasoning_content === "string" && delta.reasoning_content) yield { thinking: delta.reasoning_content };
  if (typeof delta.content === "string" && delta.content) yield { content: delta.content };
  for (const call of Array.isArray(delta.tool_calls) ? delta.tool_calls : []) {
    const { name = "", arguments: text = "" } = call.function ?? {};
    yield { call: { index: call.index ?? 0, id: call.id ?? "", name: name ?? "", arguments: text ?? "" } };
  }
  // OpenAI's word for an answer that a limit of time ended is "length", too.
  if (choice?.finish_reason) yield { finish: choice.stop_reason === "timeout" ? "timeout" : String(choice.finish_reason) };
  if (chunk?.usage) yield { usage: chunk.usage };
}
