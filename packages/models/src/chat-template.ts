// Chat templates of checkpoints: Jinja programs that make one text of a list of messages. They come with downloads, so they run
// in an interpreter with a bound on work and size, and see nothing but what is given to them.
import { Environment, Interpreter, parse, tokenize } from "@huggingface/jinja";
import { CheckpointError, type Json, ShapeError } from "@switchyard/core";
import { builtIn } from "./built-in.ts";
import { isRecord, type OpenCheckpoint } from "./checkpoint.ts";
import { folderFiles } from "./files.ts";
import { quote } from "./safetensors.ts";

/** One message. Templates read further keys too, such as `tool_calls`; `content` is a text or a list of parts. */
export interface ChatMessage {
  readonly role: string;
  readonly content?: Json;
  readonly [key: string]: Json | undefined;
}

export interface ChatOptions {
  /** Ends with the header of an answer, so that the model writes one; default false, as in Transformers. */
  readonly addGenerationPrompt?: boolean;
  /** JSON schemas of functions that the model may call. */
  readonly tools?: readonly Json[];
  /** Documents `{ title, text }` for retrieval templates. */
  readonly documents?: readonly Json[];
  /** Which of several named templates; default: "tool_use" where there are tools and one of that name, else "default". */
  readonly template?: string;
  /** Further variables of the template (`enable_thinking`); they may replace the special tokens. */
  readonly variables?: { readonly [key: string]: Json };
  /** The time for templates that print today's date, in local time; default: now. */
  readonly date?: Date;
}

export interface ChatTemplate {
  /** Names of the templates; none where the checkpoint has no template, and then `render` says so. */
  readonly names: readonly string[];
  /**
   * The text for a model. It holds the special tokens already: encode it without adding any, which is the default of
   * `Tokenizer.encode`. Throws ShapeError for messages that are none or that the template refuses (in its own words), CheckpointError
   * where there is no template, it is not valid Jinja, uses what the interpreter does not know, or does not come to an end.
   */
  render(messages: readonly ChatMessage[], options?: ChatOptions): string;
}

/** The files beside the weights that hold templates and the special tokens in them. */
export interface ChatTemplateFiles {
  /** Content of tokenizer_config.json: `chat_template` is a text or a list of `{ name, template }`. */
  readonly config?: { readonly [key: string]: Json } | undefined;
  /** Text of chat_template.jinja, the template "default"; it and `named` come before the others, which are not looked at then. */
  readonly jinja?: string | undefined;
  /** Texts of additional_chat_templates/NAME.jinja by name. */
  readonly named?: Readonly<Record<string, string>> | undefined;
  /** Content of chat_template.json; it comes last. */
  readonly json?: { readonly [key: string]: Json } | undefined;
  /** Content of special_tokens_map.json, for special tokens that tokenizer_config.json does not name. */
  readonly specialTokens?: { readonly [key: string]: Json } | undefined;
}

/** In characters; the longest of published models have about 30 thousand. */
const longestTemplate = 1 << 17;
/** The lexer's patterns take the square of a run of white space. */
const longestBlank = 1000;
/** Expressions evaluated, and what stands for the time of other things, in the same unit: some seconds in all. */
const mostWork = 30_000_000;
const workOfRound = 60;
/** Values inside a list or record, each counted as often as it would be printed. */
const mostValues = 1_000_000;
/** Characters of a text, beside four times what the messages have. */
const longestText = 1 << 22;
const longestRange = 100_000;

/** What raise_exception was called with. */
class Refusal extends Error {}

/** A value of the interpreter, whose classes its package does not export. */
interface Value {
  readonly type: string;
  readonly value?: unknown;
}

/** A template as the interpreter takes it. */
interface Program {
  readonly root: ReturnType<typeof parse>;
  /** Expressions that loops run over: `for x in list`, `for x in list if ...`. */
  readonly looped: WeakSet<object>;
  /** Expressions whose values are printed. */
  readonly printed: WeakSet<object>;
}

const silent = ["Set", "Macro", "Comment"];

function analysed(root: Program["root"]): Program {
  const looped = new WeakSet<object>();
  const printed = new WeakSet<object>();
  const visit = (node: unknown): void => {
    if (typeof node !== "object" || node === null) return;
    if (node instanceof Map) for (const pair of node) visit(pair);
    for (const [key, child] of Object.entries(node)) {
      if (key === "iterable" && typeof child === "object" && child) looped.add("lhs" in child ? child.lhs : child);
      if (Array.isArray(child) && ["body", "alternate", "defaultBlock"].includes(key)) {
        for (const one of child as { readonly type: string }[]) if (!silent.includes(one.type)) printed.add(one);
      }
      visit(child);
    }
  };
  visit(root);
  return { root, looped, printed };
}

/** What Python prints for a value; undefined where the interpreter does as Python does. */
function python({ type, value }: Value): string | undefined {
  if (type === "NullValue") return "None";
  if (type === "BooleanValue") return value ? "True" : "False";
  if (Array.isArray(value)) {
    const list = value.map(inPython);
    if (type === "TupleValue") return `(${list.join(", ")}${list.length === 1 ? "," : ""})`;
    return `[${list.join(", ")}]`;
  }
  if (!(type === "ObjectValue" && value instanceof Map)) return undefined;
  return `{${Array.from(value, ([key, one]) => `${quoted(key)}: ${inPython(one)}`).join(", ")}}`;
}

const inPython = (one: Value): string =>
  typeof one.value === "string" ? quoted(one.value) : (python(one) ?? String(one.value ?? "Undefined"));

/** A text as Python's repr. */
function quoted(text: string): string {
  const mark = text.includes("'") && !text.includes('"') ? '"' : "'";
  const names: Readonly<Record<string, string>> = { "\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\" };
  const inner = text.replace(/[\\'"]|[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu, (c) => {
    const code = c.codePointAt(0) ?? 0;
    if (c === "'" || c === '"') return c === mark ? `\\${c}` : c;
    const hex = (digits: number): string => code.toString(16).padStart(digits, "0");
    return names[c] ?? (code < 256 ? `\\x${hex(2)}` : code < 65536 ? `\\u${hex(4)}` : `\\U${hex(8)}`);
  });
  return mark + inner + mark;
}

/** Where an operator or filter makes a text of a value. */
const makesText = (node: Parameters<Interpreter["evaluate"]>[0]): boolean => {
  if (!node) return false;
  const { type, operator, filter } = node as { type: string; operator?: Value; filter?: Value };
  return (
    (type === "BinaryExpression" && operator?.value === "~") ||
    (type === "FilterExpression" && filter?.value === "string")
  );
};

/** Prints as Python does, counts what a template does, and stops it when that is too much. */
class Bounded extends Interpreter {
  #work = 0;
  /** Lists and records never change once made; namespaces do, so that what holds one is weighed anew. */
  readonly #weights = new WeakMap<object, number>();
  readonly #longest: number;
  readonly #program: Program;

  constructor(environment: Environment, program: Program, longest: number) {
    super(environment);
    this.#program = program;
    this.#longest = longest;
  }

  render(): string {
    const { value }: Value = this.run(this.#program.root);
    return String(value);
  }

  override evaluate(...given: Parameters<Interpreter["evaluate"]>): ReturnType<Interpreter["evaluate"]> {
    const [node, scope] = given;
    const result = makesText(node) ? this.#text(node, scope) : super.evaluate(...given);
    this.#work++;
    const { value } = result as Value;
    if (typeof value === "string") {
      if (value.length > this.#longest) throw new RangeError(`it makes a text of over ${this.#longest} characters`);
      this.#work += value.length >> 4;
    } else if (Array.isArray(value) || value instanceof Map) {
      this.#weigh(result);
      const size = Array.isArray(value) ? value.length : value.size;
      this.#work += node && this.#program.looped.has(node) ? size * workOfRound : size >> 4;
    }
    if (this.#work > mostWork) throw new RangeError("it does not come to an end");
    const printed = node && this.#program.printed.has(node) ? python(result) : undefined;
    return printed === undefined ? result : this.#literal(printed, scope);
  }

  #literal(text: string, scope: Environment): ReturnType<Interpreter["evaluate"]> {
    const node = { type: "StringLiteral", value: text };
    return super.evaluate(node, scope);
  }

  /** `a ~ b` and `a | string`. */
  #text(node: object | undefined, scope: Environment): ReturnType<Interpreter["evaluate"]> {
    type Part = Parameters<Interpreter["evaluate"]>[0];
    const { left, right, operand } = node as { left?: Part; right?: Part; operand?: Part };
    const texts = (operand ? [operand] : [left, right]).map((part) => {
      const value = this.evaluate(part, scope);
      return python(value) ?? value.toString();
    });
    return this.#literal(texts.join(""), scope);
  }

  /** How much printing a value would give, in values: a list that holds one list twice counts it twice. */
  #weigh(whole: Value): void {
    const visit = (one: Value): { readonly weight: number; readonly fixed: boolean } => {
      const { type, value } = one;
      if (typeof value === "string") return { weight: 1 + (value.length >> 4), fixed: true };
      if (!(Array.isArray(value) || value instanceof Map)) return { weight: 1, fixed: true };
      const known = this.#weights.get(value);
      if (known !== undefined) return { weight: known, fixed: true };
      let weight = 1;
      let fixed = type !== "NamespaceValue";
      for (const child of value.values() as Iterable<Value>) {
        const inner = visit(child);
        weight += inner.weight;
        fixed &&= inner.fixed;
        if (weight > mostValues + (this.#longest >> 4)) {
          throw new RangeError(`it makes a list or record of over ${mostValues} values`);
        }
      }
      if (fixed) this.#weights.set(value, weight);
      return { weight, fixed };
    };
    visit(whole);
  }
}

function range(...given: readonly unknown[]): number[] {
  const numbers = given.filter((x): x is number => Number.isSafeInteger(x));
  const [start, stop, step] = numbers.length === 1 ? [0, numbers[0] ?? 0, 1] : [numbers[0] ?? 0, numbers[1] ?? 0, 1];
  const by = numbers[2] ?? step;
  if (numbers.length !== given.length || numbers.length < 1 || numbers.length > 3 || by === 0) {
    throw new TypeError(`range(${given.join(", ")}) needs one to three whole numbers, the third not 0`);
  }
  const length = Math.max(0, Math.ceil((stop - start) / by));
  if (length > longestRange) throw new RangeError(`range(${given.join(", ")}) has over ${longestRange} numbers`);
  return Array.from({ length }, (_, i) => start + i * by);
}

/** Python's strftime in English, for the parts that dates in prompts use. */
function strftime(date: Date, format: string): string {
  const part = (options: Intl.DateTimeFormatOptions): string =>
    new Intl.DateTimeFormat("en-US", options).format(date).replace(/^.*, /, "");
  const two = (n: number): string => String(n).padStart(2, "0");
  const parts: Readonly<Record<string, () => string>> = {
    Y: () => String(date.getFullYear()),
    y: () => two(date.getFullYear() % 100),
    m: () => two(date.getMonth() + 1),
    d: () => two(date.getDate()),
    B: () => part({ month: "long" }),
    b: () => part({ month: "short" }),
    A: () => part({ weekday: "long" }),
    a: () => part({ weekday: "short" }),
    H: () => two(date.getHours()),
    I: () => two(date.getHours() % 12 || 12),
    M: () => two(date.getMinutes()),
    S: () => two(date.getSeconds()),
    p: () => (date.getHours() < 12 ? "AM" : "PM"),
    "%": () => "%",
  };
  return format.replace(/%(.)/g, (whole, letter: string) => {
    const make = Object.hasOwn(parts, letter) ? parts[letter] : undefined;
    if (!make) throw new TypeError(`strftime_now: ${whole} is not known, only %${Object.keys(parts).join(" %")}`);
    return make();
  });
}

/** Templates by name, unchecked: a broken one must not keep a model from loading. */
function templates({ config = {}, jinja, named = {}, json = {} }: ChatTemplateFiles): Map<string, Json> {
  const files = [...(jinja === undefined ? [] : [["default", jinja] as const]), ...Object.entries(named)];
  if (files.length > 0) return new Map(files);
  const found = config.chat_template ?? json.chat_template;
  if (found === undefined || found === null) return new Map();
  if (isRecord(found)) return new Map(Object.entries(found));
  if (!Array.isArray(found)) return new Map([["default", found]]);
  return new Map(
    found.map((one: Json, i) => {
      const { name, template = null } = isRecord(one) ? one : {};
      return [typeof name === "string" ? name : `${i}`, template] as const;
    }),
  );
}

const roles = ["bos", "eos", "unk", "sep", "pad", "cls", "mask"].map((role) => `${role}_token`);

/** Special tokens as variables: "<s>", or `{ "content": "<s>" }` in some files. */
function specialTokens({ config = {}, specialTokens: map = {} }: ChatTemplateFiles): Record<string, string> {
  const found: Record<string, string> = {};
  for (const role of roles) {
    const token = config[role] ?? map[role];
    const text = isRecord(token) ? token.content : token;
    if (typeof text === "string") found[role] = text;
  }
  return found;
}

function compile(name: string, text: Json): Program {
  const which = `the chat template ${quote(name)}`;
  if (typeof text !== "string") {
    throw new CheckpointError(
      `${which} is ${JSON.stringify(text).slice(0, 40)}, not a text; the checkpoint is damaged`,
    );
  }
  if (text.length > longestTemplate) {
    throw new CheckpointError(`${which} has ${text.length} characters; at most ${longestTemplate} are allowed`);
  }
  if (new RegExp(`\\s{${longestBlank + 1}}`).test(text)) {
    throw new CheckpointError(`${which} has over ${longestBlank} white characters in a row; that is not allowed`);
  }
  try {
    return analysed(parse(tokenize(text, { lstrip_blocks: true, trim_blocks: true })));
  } catch (cause) {
    throw new CheckpointError(`${which} is not valid Jinja: ${words(cause)}`, { cause });
  }
}

const words = (error: unknown): string => (error instanceof Error ? error.message : String(error));

function checkMessages(messages: readonly ChatMessage[]): void {
  if (messages.length === 0) throw new ShapeError("chat: there are no messages; at least one is needed");
  messages.forEach((message, i) => {
    const role: unknown = (message as Partial<ChatMessage> | null)?.role;
    if (typeof role !== "string") {
      throw new ShapeError(
        `chat: message ${i} is ${quote(JSON.stringify(message))}; expected { role: "user", content: "..." }`,
      );
    }
  });
}

/** Length of everything in it, roughly. */
const lengthOf = (value: unknown): number => JSON.stringify(value)?.length ?? 0;

/**
 * The chat template of a checkpoint from its files.
 *
 * @example const text = chatTemplate({ config }).render([{ role: "user", content: "Hi" }], { addGenerationPrompt: true });
 */
export function chatTemplate(files: ChatTemplateFiles): ChatTemplate {
  const sources = templates(files);
  const names = [...sources.keys()];
  const special = specialTokens(files);
  const programs = new Map<string, Program>();

  const choose = ({ template, tools }: ChatOptions): string => {
    if (names.length === 0) {
      throw new CheckpointError(
        "this checkpoint has no chat template: neither chat_template.jinja nor `chat_template` in tokenizer_config.json. " +
          "Base models are trained on plain text: give the model a prompt instead of messages",
      );
    }
    const name = template ?? (tools && sources.has("tool_use") ? "tool_use" : "default");
    if (sources.has(name)) return name;
    const known = names.map((one) => quote(one)).join(", ");
    throw new ShapeError(`chat: there is no template ${quote(name)}; this checkpoint has ${known}`);
  };
  const find = (name: string): Program => {
    const program = programs.get(name) ?? compile(name, sources.get(name) ?? null);
    programs.set(name, program);
    return program;
  };

  return {
    names,
    render(messages, options = {}) {
      checkMessages(messages);
      const { addGenerationPrompt = false, tools, documents, variables = {}, date } = options;
      const name = choose(options);
      const program = find(name);
      const given = { messages, tools: tools ?? null, documents: documents ?? null, ...special, ...variables };
      const globals = {
        ...{ true: true, True: true, false: false, False: false, none: null, None: null },
        range,
        raise_exception: (message: unknown) => {
          throw new Refusal(String(message));
        },
        strftime_now: (format: unknown) => strftime(date ?? new Date(), String(format)),
      };
      const environment = new Environment();
      const everything = { ...globals, ...given, add_generation_prompt: addGenerationPrompt };
      try {
        for (const [key, value] of Object.entries(everything)) environment.set(key, value);
        return new Bounded(environment, program, longestText + 4 * lengthOf(given)).render();
      } catch (cause) {
        if (cause instanceof Refusal) {
          throw new ShapeError(`chat: the template refuses these messages: ${cause.message}`, { cause });
        }
        throw new CheckpointError(`the chat template ${quote(name)} failed: ${words(cause)}`, { cause });
      }
    },
  };
}

/** Models have two or three. */
const mostNamed = 100;

/**
 * The named chat templates of a checkpoint in a folder, as Transformers saves them: additional_chat_templates/NAME.jinja, for
 * `readChatTemplate` (Node). Throws CheckpointError for more than 100 of them, too long ones, and links that lead out of the folder.
 */
export async function namedChatTemplates(
  folder: string,
  { followLinks = false }: { readonly followLinks?: boolean } = {},
): Promise<Readonly<Record<string, string>>> {
  const { join } = await builtIn("node:path");
  const below = join(folder, "additional_chat_templates");
  const files = await folderFiles(below, { followLinks, within: folder });
  const names = (await files.list()).filter((name) => name.endsWith(".jinja")).sort();
  if (names.length > mostNamed) {
    throw new CheckpointError(`${below} holds ${names.length} chat templates; at most ${mostNamed} are allowed`);
  }
  const found: [string, string][] = [];
  for (const name of names) {
    const file = await files.open(name);
    if (!file) continue;
    try {
      // A character of UTF-8 has up to four bytes.
      if (file.size > 4 * longestTemplate) {
        throw new CheckpointError(`${file.name} has ${file.size} bytes; at most ${4 * longestTemplate} are allowed`);
      }
      const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.read(0, file.size));
      found.push([name.slice(0, -".jinja".length), text]);
    } catch (cause) {
      if (CheckpointError.isInstance(cause)) throw cause;
      throw new CheckpointError(`${file.name} is not a text: it is not UTF-8`, { cause });
    } finally {
      await file.close();
    }
  }
  return Object.fromEntries(found);
}

/**
 * The chat template of an open checkpoint; `named` are those of a folder beside it, as `namedChatTemplates` reads them.
 * Throws CheckpointError for files that are too large or no JSON.
 */
export async function readChatTemplate(
  checkpoint: Pick<OpenCheckpoint, "json" | "text">,
  named: Readonly<Record<string, string>> = {},
): Promise<ChatTemplate> {
  const [config, jinja, json, specialTokens] = await Promise.all([
    checkpoint.json("tokenizer_config.json"),
    checkpoint.text("chat_template.jinja"),
    checkpoint.json("chat_template.json"),
    checkpoint.json("special_tokens_map.json"),
  ]);
  return chatTemplate({ named, config, jinja, json, specialTokens });
}
