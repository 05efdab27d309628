// One answer, from the request to its last token. The message is filled while it arrives; `draw` is called as often as
// the page can draw it.
import { streamAnswer } from "./api.js";
import { t } from "./language.js";

const SAVED_EVERY = 2000; // milliseconds

export class Answering {
  // begin() is called when the server has begun to answer.
  constructor(message, request, key, { begin, draw, save }) {
    this.message = message;
    this.controller = new AbortController();
    this.begin = begin;
    this.draw = draw;
    this.save = save;
    this.pending = 0;
    this.slowest = 0;
    this.isLeft = false; // the page is being closed, which breaks the connection
    this.done = this.#run(request, key);
  }

  stop() {
    this.controller.abort();
  }

  leave() {
    this.isLeft = true;
    this.save();
  }

  async #run(request, key) {
    const { message } = this;
    const started = performance.now();
    let first = 0;
    let saved = started;
    try {
      for await (const event of streamAnswer(request, key, this.controller.signal)) {
        if (this.controller.signal.aborted) return null; // what had arrived before it was stopped
        const now = performance.now();
        if (!first) this.begin();
        if (!event.usage) first ||= now;
        this.#take(event, now - started);
        message.time = now - first;
        this.#schedule();
        if (now - saved > SAVED_EVERY) {
          saved = now;
          this.save();
        }
      }
      return null;
    } catch (error) {
      if (error.name === "AbortError") {
        message.finish = "stopped";
        return null;
      }
      if (this.isLeft) return null;
      message.error = error.kind ? error.message : t("The page failed: {fault}", { fault: error.message });
      return error;
    } finally {
      cancelAnimationFrame(this.pending);
    }
  }

  #take(event, time) {
    const { message } = this;
    if (event.thinking) {
      message.thinking += event.thinking;
      message.thinkingTime = time;
    } else if (event.content) {
      message.content += event.content;
    } else if (event.call) {
      const call = (message.calls[event.call.index] ??= { id: "", name: "", arguments: "" });
      call.id ||= event.call.id;
      call.name += event.call.name;
      call.arguments += event.call.arguments;
    } else if (event.finish) {
      message.finish = event.finish;
    } else if (event.usage) {
      message.usage = event.usage;
    }
  }

  // Long answers take longer to draw: at most half of the time goes into drawing.
  #schedule() {
    if (this.pending) return;
    const asked = performance.now();
    const frame = () => {
      const start = performance.now();
      if (start - asked < this.slowest) {
        this.pending = requestAnimationFrame(frame);
        return;
      }
      this.pending = 0;
      this.draw();
      this.slowest = Math.min(1000, 2 * (performance.now() - start));
    };
    this.pending = requestAnimationFrame(frame);
  }
}
