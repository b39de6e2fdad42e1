// Figures of the server in the text format of Prometheus (version 0.0.4).
import type { PrefixCache } from "@switchyard/models";
import type { OpenModel } from "../model-arguments.ts";
import type { ExpertLoad, Pass } from "./observed.ts";
import type { Turns } from "./turns.ts";

/** Seconds that "tokens per second" looks back. */
const lately = 10;

type Labels = Readonly<Record<string, string | number>>;

const escaped = (value: string | number): string =>
  String(value).replace(/[\\"\n]/g, (one) => (one === "\n" ? "\\n" : `\\${one}`));

const sample = (name: string, value: number, labels: Labels = {}): string => {
  const list = Object.entries(labels).map(([key, label]) => `${key}="${escaped(label)}"`);
  return `${name}${list.length > 0 ? `{${list.join(",")}}` : ""} ${value}`;
};

function family(
  type: "counter" | "gauge",
  name: string,
  help: string,
  samples: readonly (readonly [number, Labels?])[],
) {
  if (samples.length === 0) return "";
  const lines = samples.map(([value, labels]) => sample(name, value, labels));
  return `# HELP ${name} ${help}\n# TYPE ${name} ${type}\n${lines.join("\n")}\n`;
}

interface Duration {
  count: number;
  seconds: number;
}

function summary(name: string, help: string, { count, seconds }: Duration): string {
  return `# HELP ${name} ${help}\n# TYPE ${name} summary\n${sample(`${name}_sum`, seconds)}\n${sample(`${name}_count`, count)}\n`;
}

export class Metrics {
  readonly #requests = new Map<string, { readonly labels: Labels; count: number }>();
  readonly #perSecond = new Map<number, number>();
  readonly #took: Duration = { count: 0, seconds: 0 };
  readonly #first: Duration = { count: 0, seconds: 0 };
  readonly #passes: Duration = { count: 0, seconds: 0 };
  #prompt = 0;
  #reused = 0;
  #made = 0;
  #seen = 0;

  request(endpoint: string, status: number): void {
    const key = `${endpoint} ${status}`;
    const found = this.#requests.get(key);
    if (found) found.count++;
    else this.#requests.set(key, { labels: { endpoint, status }, count: 1 });
  }

  prompt(tokens: number): void {
    this.#prompt += tokens;
  }

  /** Tokens of a prompt that need not be run. */
  reused(tokens: number): void {
    this.#reused += tokens;
  }

  /** One token was made. */
  token(now: number = Date.now()): void {
    this.#made++;
    const second = Math.floor(now / 1000);
    this.#perSecond.set(second, (this.#perSecond.get(second) ?? 0) + 1);
    for (const old of this.#perSecond.keys()) if (old < second - lately) this.#perSecond.delete(old);
  }

  first(seconds: number): void {
    this.#first.count++;
    this.#first.seconds += seconds;
  }

  took(seconds: number): void {
    this.#took.count++;
    this.#took.seconds += seconds;
  }

  pass({ tokens, seconds }: Omit<Pass, "past">): void {
    this.#passes.count++;
    this.#passes.seconds += seconds;
    this.#seen += tokens;
  }

  /** Of the last ten whole seconds. */
  tokensPerSecond(now: number = Date.now()): number {
    const second = Math.floor(now / 1000);
    let sum = 0;
    for (const [at, count] of this.#perSecond) if (at < second && at >= second - lately) sum += count;
    return sum / lately;
  }

  render(
    { model }: OpenModel,
    {
      requests,
      load,
      prefix,
    }: { readonly requests: Turns; readonly load: ExpertLoad; readonly prefix?: PrefixCache | undefined },
    now?: number,
  ): string {
    const one = (type: "counter" | "gauge", name: string, help: string, value: number): string =>
      family(type, name, help, [[value]]);
    const places = load.routing.map(({ layer, part }, place) => ({ place, labels: { layer, part } }));
    const streamed = model.streamed?.counts();
    return [
      family(
        "counter",
        "switchyard_requests_total",
        "Requests answered, by status; 499: the client left.",
        Array.from(this.#requests.values(), ({ labels, count }) => [count, labels] as const),
      ),
      one("gauge", "switchyard_requests_running", "Requests that generate.", requests.running),
      one("gauge", "switchyard_requests_waiting", "Requests in the queue.", requests.waiting),
      one("counter", "switchyard_prompt_tokens_total", "Tokens of prompts.", this.#prompt),
      ...(prefix
        ? [
            one("counter", "switchyard_prompt_reused_tokens_total", "Those that were not run anew.", this.#reused),
            one("gauge", "switchyard_prefix_texts", "Texts kept for later prompts.", prefix.texts),
            one("gauge", "switchyard_prefix_bytes", "Bytes of their keys and values.", prefix.bytes),
          ]
        : []),
      one("counter", "switchyard_generated_tokens_total", "Tokens made.", this.#made),
      one(
        "gauge",
        "switchyard_tokens_per_second",
        `Tokens made per second, over the last ${lately} seconds.`,
        this.tokensPerSecond(now),
      ),
      one("counter", "switchyard_pass_tokens_total", "Tokens that went through the model.", this.#seen),
      summary("switchyard_pass_seconds", "Forward passes.", this.#passes),
      summary("switchyard_first_token_seconds", "From a request to its first token, with the queue.", this.#first),
      summary("switchyard_request_seconds", "From a request to the end of its answer.", this.#took),
      ...(streamed
        ? [
            one("counter", "switchyard_expert_requests_total", "Experts that passes asked for.", streamed.requests),
            one("counter", "switchyard_expert_cache_hits_total", "Those that were in memory.", streamed.hits),
            one("counter", "switchyard_expert_prefetches_total", "Experts loaded ahead.", streamed.prefetches),
            one("counter", "switchyard_expert_read_bytes_total", "Bytes of experts read.", streamed.bytesRead),
          ]
        : []),
      family(
        "counter",
        "switchyard_expert_tokens_total",
        "Tokens that each expert got.",
        places.flatMap(({ place, labels }) =>
          Array.from(load.tokens[place] ?? [], (tokens, expert) => [tokens, { ...labels, expert }] as const),
        ),
      ),
      family(
        "gauge",
        "switchyard_layer_busiest_load",
        "Tokens of the busiest expert of a layer over the mean: 1 is balanced.",
        places.map(({ place, labels }) => [load.busiest(place), labels] as const),
      ),
      one("gauge", "switchyard_live_tensors", "Tensors on the device.", model.engine.live()),
      one("gauge", "process_resident_memory_bytes", "Memory of the process.", process.memoryUsage.rss()),
    ].join("");
  }
}
