// For authors of routers: what makes a plugin a plugin, checked in words, and a factory from a name, default options and a function.
import { ShapeError, UnsupportedError } from "../errors.ts";
import type { Gift, Need, Plan, RouterPlugin } from "./plan.ts";

/** A router as plain data: its row in a README and what a reader asks first. */
export interface RouterCard {
  /** The name of the factory: `topK`. */
  readonly name: string;
  readonly title: string;
  /** arXiv id. */
  readonly paper: string;
  /** Numbers, in the paper, of the equations implemented. */
  readonly equations: string;
  readonly needs: readonly Need[];
  /** "yes", "no", or in which phase. */
  readonly causal: string;
  readonly plans: readonly Plan["kind"][];
  /** Parameters and buffers added per layer. */
  readonly params: string;
  /** Per token, beside the experts that run. */
  readonly cost: string;
  /** What the paper reports. */
  readonly claim: string;
  /** Where the paper leaves something open, or this package departs from it. */
  readonly ourChoices: readonly string[];
}

/** Options that a command line and a checkpoint can hold. `null` as a default: absent, any value may be given. */
export interface RouterOptions {
  readonly [name: string]: number | string | boolean | null;
}

/** Options by their defaults: `{ k: 2 }` takes any number, not only 2. */
export type OptionsOf<D extends RouterOptions> = {
  readonly [N in keyof D]: D[N] extends number
    ? number
    : D[N] extends boolean
      ? boolean
      : D[N] extends string
        ? string
        : number | string | boolean | null;
};

export interface RouterDefinition<D extends RouterOptions> {
  /** Letters, digits, "-" and "_": it stands on command lines and in checkpoints. */
  readonly name: string;
  /** Every option with its default. */
  readonly options: D;
  /** Plain data for a README; checked against the plugin. */
  readonly card?: Partial<RouterCard>;
  /** The plugin of complete options, without name and options. It throws ShapeError for values out of range. */
  plugin(options: OptionsOf<D>): Omit<RouterPlugin, "name" | "options">;
}

/**
 * The factory of a router: `defineRouter({ name, options, plugin })` gives what `topK` is, a function from some options to a plugin.
 * Throws UnsupportedError at once for a name that cannot be used and a card that cannot be kept; the factory throws it for options that do
 * not exist or have another type than their default, and for a plugin that is none, each in one sentence.
 *
 * @example
 * export const nearest = defineRouter({
 *   name: "nearest",
 *   options: { k: 2 },
 *   plugin: ({ k }) => ({ causal: { training: true, evaluation: true }, needs: [], plans: ["sparse"], expertsPerToken: k, init }),
 * });
 */
export function defineRouter<const D extends RouterOptions>(
  definition: RouterDefinition<D>,
): (options?: Partial<OptionsOf<D>>) => RouterPlugin {
  const { name, options: defaults, card, plugin: make } = definition;
  const refuse = (why: string): never => {
    throw new UnsupportedError(`router ${String(name)}: ${why}`);
  };
  const wrongName = String(name).includes("+") ? wordFault : nameFault(name);
  if (wrongName) refuse(wrongName);
  if (card?.name !== undefined && card.name !== name) refuse(`its card is that of "${card.name}"`);
  if (card && !plainData(card)) {
    refuse("its card must be plain data that JSON can hold");
  }
  return (given = {}) => {
    const known = Object.keys(defaults);
    const complete: Record<string, number | string | boolean | null> = { ...defaults };
    for (const [option, value] of Object.entries<unknown>(given)) {
      if (value === undefined) continue;
      const wanted = Object.entries(defaults).find(([key]) => key === option);
      if (!wanted) refuse(`there is no option "${option}"; its options are ${known.join(", ") || "none"}`);
      complete[option] = checked(name, option, { value, usual: wanted?.[1] ?? null });
    }
    const made = make(complete as OptionsOf<D>);
    const plugin: RouterPlugin = { ...made, name, options: complete };
    const fault = pluginFault(plugin);
    if (fault) refuse(fault);
    for (const field of ["needs", "plans"] as const) {
      const said = card?.[field];
      if (said && said.join() !== plugin[field].join()) {
        refuse(`its card says ${field} [${said.join(", ")}], the plugin [${plugin[field].join(", ")}]`);
      }
    }
    return plugin;
  };
}

type Option = RouterOptions[string];
function checked(router: string, option: string, { value, usual }: { value: unknown; usual: Option }): Option {
  const fits = value === null ? usual === null : usual === null ? true : typeof value === typeof usual;
  const plain = value === null || typeof value === "string" || typeof value === "boolean" || Number.isFinite(value);
  if (fits && plain) return value as Option;
  const shown = typeof value === "string" ? `"${value}"` : String(value);
  const wanted = usual === null ? "a number, a word or a boolean" : `a ${typeof usual} such as ${String(usual)}`;
  throw new ShapeError(`router ${router}: ${option} = ${shown}; expected ${wanted}`);
}

const planKinds: readonly Plan["kind"][] = ["sparse", "dense", "expert-choice", "slots", "merge"];
const needNames: Readonly<Record<Need, true>> = {
  tokenIds: true,
  modalityIds: true,
  attention: true,
  everyExpert: true,
  carry: true,
  mixedExperts: true,
  target: true,
  host: true,
};
const giftNames: Readonly<Record<Gift, true>> = { scores: true, logits: true, probabilities: true, choices: true };

const wordFault = 'its name must be a word: a letter, then letters, digits, "-" or "_"';
function nameFault(name: unknown): string | undefined {
  if (typeof name === "string" && /^[A-Za-z][\w-]*(\+[\w-]+)*$/.test(name)) return undefined;
  return wordFault;
}

/** Why a value is no router plugin, in words; undefined when it is one. For whoever takes plugins from other people's modules. */
export function pluginFault(value: unknown): string | undefined {
  if (typeof value !== "object" || value === null) {
    const hint = typeof value === "function" ? "; what defineRouter gives is the factory: export that itself" : "";
    return `it is ${value === null || value === undefined ? String(value) : `a ${typeof value}`}, not an object${hint}`;
  }
  const { name, causal, needs, plans, gives, options, expertsPerToken, sharedExperts, perSample, init } =
    value as Record<string, unknown>;
  const record = (x: unknown): x is Record<string, unknown> => typeof x === "object" && x !== null && !Array.isArray(x);
  const listOf = (x: unknown, known: readonly string[]): boolean =>
    Array.isArray(x) && x.every((one) => known.includes(one));
  const wrongName = nameFault(name);
  if (wrongName) return wrongName;
  if (typeof init !== "function") return "it has no init(context), which makes the router of one layer";
  if (!record(causal) || typeof causal.training !== "boolean" || typeof causal.evaluation !== "boolean") {
    return "causal must say { training: boolean, evaluation: boolean }: whether a route depends on earlier tokens only";
  }
  if (!listOf(plans, planKinds) || (Array.isArray(plans) && plans.length === 0)) {
    return `plans must list the kinds of plan it returns, of ${planKinds.join(", ")}`;
  }
  if (!listOf(needs, Object.keys(needNames))) {
    return `needs must be a list, empty or of ${Object.keys(needNames).join(", ")}`;
  }
  if (gives !== undefined && !listOf(gives, Object.keys(giftNames))) {
    return `gives must be a list of ${Object.keys(giftNames).join(", ")}, or absent`;
  }
  if (perSample !== undefined && typeof perSample !== "boolean") return "perSample must be true or false, or absent";
  const positive = (x: unknown): boolean => typeof x === "number" && Number.isFinite(x) && x > 0;
  if (expertsPerToken !== undefined && !positive(expertsPerToken)) {
    return `expertsPerToken is ${String(expertsPerToken)}; expected a number above 0, or nothing`;
  }
  if (
    sharedExperts !== undefined &&
    !(typeof sharedExperts === "number" && Number.isInteger(sharedExperts) && sharedExperts >= 0)
  ) {
    return `sharedExperts is ${String(sharedExperts)}; expected a whole number from 0, or nothing`;
  }
  if (options !== undefined && (!record(options) || !plainData(options))) {
    return "options must be plain data that JSON can hold, every default filled in (null where there is none)";
  }
  return undefined;
}

function plainData(value: unknown): boolean {
  if (value === null || typeof value === "string" || typeof value === "boolean") return true;
  if (typeof value === "number") return Number.isFinite(value);
  if (Array.isArray(value)) return value.every(plainData);
  return typeof value === "object" && Object.values(value).every(plainData);
}
