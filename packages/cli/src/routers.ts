// Routers by name: "topK", "topK:k=1", "topK:k=4:order=topk-softmax", those of files and packages ("./my-router.ts:k=4"), and wrappers
// around them ("topK:k=2+capacity:factor=1.25"). The factories of the names are those of @switchyard/routers.
import { UnsupportedError } from "@switchyard/core";
import type { RouterPlugin, TrainingHook } from "@switchyard/core/moe";
import {
  withBalanceLoss,
  withCapacity,
  withJitter,
  withNoise,
  withNullExperts,
  withSharedExperts,
  withZLoss,
} from "@switchyard/core/wrappers";
import {
  adaMoE,
  attentionAware,
  base,
  competeSMoE,
  daMoE,
  deepSeekV2,
  deepSeekV3,
  dynMoLE,
  expertChoice,
  expertRace,
  expressiveGates,
  fuseMoE,
  grin,
  gshard,
  hash,
  maskMoE,
  moa,
  moec,
  moeFFD,
  moge,
  muMoE,
  noisyTopK,
  nullExperts,
  reMoE,
  rMoE,
  similarityAware,
  sinkhorn,
  smear,
  softMoE,
  switchRouter,
  theoryGates,
  thor,
  topK,
  topP,
  viMoE,
  vqMoE,
  xMoE,
} from "@switchyard/routers";
import { competeSMoESchedule } from "@switchyard/routers/compete-smoe";
import { thorHook } from "@switchyard/routers/thor";
import { fileOfPackage, routerOfFile } from "./plugin-router.ts";
import { type OptionValue, parseSpecification, type Specification } from "./specification.ts";

interface Known {
  /** The factory. It checks its options itself. */
  make(options: object): RouterPlugin;
  /** Options that it requires. */
  readonly defaults: Readonly<Record<string, OptionValue>>;
  /** Options that make it causal where others do not. */
  readonly causal?: string;
  /** What its method does to training beside routing; `layers`: MoE layers of the model. */
  hooks?(layers: number): readonly TrainingHook[];
}

const known: Readonly<Record<string, Known>> = {
  topK: { make: topK, defaults: { k: 2 } },
  switchRouter: { make: switchRouter, defaults: {} },
  reMoE: { make: reMoE, defaults: { k: 2 } },
  expertChoice: { make: expertChoice, defaults: {} },
  topP: { make: topP, defaults: {} },
  sinkhorn: { make: sinkhorn, defaults: { k: 2 } },
  similarityAware: { make: similarityAware, defaults: { k: 2 } },
  attentionAware: { make: attentionAware, defaults: { k: 2 } },
  base: { make: base, defaults: {} },
  // Tokens of a language model must not compete with later ones.
  expertRace: {
    make: expertRace,
    defaults: { k: 2, training: "threshold" },
    causal: "training=threshold:evaluation=threshold",
  },
  hash: { make: hash, defaults: {} },
  maskMoE: { make: maskMoE, defaults: { k: 2 } },
  // The paper's state of 256 is wider than these models.
  rMoE: { make: rMoE, defaults: { k: 2, size: 64 } },
  noisyTopK: { make: noisyTopK, defaults: { k: 2 } },
  nullExperts: { make: nullExperts, defaults: { k: 4 } },
  adaMoE: { make: adaMoE, defaults: { k: 6 } },
  expressiveGates: { make: expressiveGates, defaults: { k: 2, balance: 0.01 } },
  xMoE: { make: xMoE, defaults: {} },
  grin: { make: grin, defaults: { k: 2 } },
  softMoE: { make: softMoE, defaults: {} },
  // How much attention a token receives, later tokens decide.
  daMoE: { make: daMoE, defaults: { k: 4, asDecoded: true }, causal: "asDecoded=true:attention=causal" },
  deepSeekV3: { make: deepSeekV3, defaults: { k: 2 } },
  deepSeekV2: { make: deepSeekV2, defaults: { k: 2 } },
  dynMoLE: { make: dynMoLE, defaults: {} },
  // Later tokens must not take the places of earlier ones.
  gshard: { make: gshard, defaults: { order: "tokens" }, causal: "order=tokens" },
  moa: { make: moa, defaults: {} },
  moec: { make: moec, defaults: { k: 2, clusters: 4, dropout: 0.5 } },
  fuseMoE: { make: fuseMoE, defaults: { k: 2 } },
  moeFFD: { make: moeFFD, defaults: {}, causal: "level=token" },
  thor: { make: thor, defaults: {}, hooks: () => [thorHook()] },
  competeSMoE: { make: competeSMoE, defaults: {}, hooks: (layers) => [competeSMoESchedule({ layers })] },
  // Its discrete path runs one expert more.
  vqMoE: { make: vqMoE, defaults: { k: 1 } },
  moge: { make: moge, defaults: { k: 2 } },
  viMoE: { make: viMoE, defaults: {} },
  theoryGates: { make: theoryGates, defaults: { k: 2, balance: 0.01 } },
  smear: { make: smear, defaults: {} },
  // Without factorised experts every token mixes whole matrices: for tiny models only.
  muMoE: { make: muMoE, defaults: {}, causal: "norm=layer" },
};

/** Names of all routers, those included that a language model refuses. */
export const routerNames: readonly string[] = Object.keys(known);

/** What `switchyard train` compares when nothing is said. */
export const defaultRouters: readonly string[] = [
  "topK",
  "similarityAware",
  "attentionAware",
  "nullExperts",
  "expertRace",
];

type Options = Readonly<Record<string, OptionValue>>;

/** What may stand behind a plus, around a router: "+capacity:factor=1.25". */
const wrappers: Readonly<Record<string, (plugin: RouterPlugin, options: Options) => RouterPlugin>> = {
  capacity: withCapacity,
  sharedExperts: withSharedExperts,
  jitter: withJitter,
  nullExperts: withNullExperts,
  noise: withNoise,
  balanceLoss: withBalanceLoss,
  zLoss: withZLoss,
};

/** Names of all wrappers. */
export const wrapperNames: readonly string[] = Object.keys(wrappers);

export interface NamedRouter {
  /** As the user wrote it; of a file only its name. */
  readonly label: string;
  readonly plugin: RouterPlugin;
  /** The same with absolute paths, for the run's settings. */
  readonly specification: string;
  /** SHA-256 of the file of a router that is not ours. */
  readonly digest?: string;
  /** Hooks of its method, made anew for every run. */
  hooks?(layers: number): readonly TrainingHook[];
}

const isCausal = ({ causal: { training, evaluation } }: RouterPlugin): boolean => training && evaluation;

/** What a router needs and text does not have, in words. */
function unmet({ needs }: RouterPlugin): string | undefined {
  if (needs.includes("modalityIds")) return "the modality of each token";
  return needs.includes("target") ? "a target of its own for each token" : undefined;
}

/** Names of the routers that fit a language model with their defaults: they look back only, and ask for what text has. */
export function causalRouters(): readonly string[] {
  return Object.entries(known).flatMap(([name, { make, defaults }]) => {
    const plugin = make(defaults);
    return isCausal(plugin) && unmet(plugin) === undefined ? [name] : [];
  });
}

/** The list with "all" replaced by every router that fits; what is named beside it is not taken twice. */
export function allNamed(specifications: readonly string[]): readonly string[] {
  if (!specifications.includes("all")) return specifications;
  return [...new Set(specifications.flatMap((one) => (one === "all" ? causalRouters() : [one])))];
}

/**
 * Makes the router that a specification names: one of ours, that of a file, or that of a package installed for `folder`.
 * @throws UnsupportedError for an unknown name (it lists the known ones), an unknown option, a file or package without a router, or a
 * router that looks ahead.
 */
export async function routerFrom(text: string, folder: string = process.cwd()): Promise<NamedRouter> {
  const parsed = parseSpecification(text, folder);
  const { head, options: given, label, portable: specification } = parsed;
  const { digest, ...found } = await innermost(parsed, folder);
  let { plugin } = found;
  const checkOptions = (of: RouterPlugin, asked: Specification["options"], name: string): void => {
    // A wrapper's options hold those of the router inside; expertRace has an option of that name.
    const nested = (name: string, value: unknown): boolean => name === "router" && typeof value === "object";
    const options = Object.entries(of.options ?? {}).flatMap(([option, value]) =>
      nested(option, value) ? [] : [option],
    );
    const wrong = of.options && asked.find(([option]) => !options.includes(option));
    if (!wrong) return;
    throw new UnsupportedError(
      `router "${label}": ${name} has no option "${wrong[0]}"; its options are ${options.join(", ") || "none"}`,
    );
  };
  checkOptions(plugin, given, parsed.isFile ? plugin.name : head);
  refuseUnfit(plugin, label, digest === undefined ? known[head]?.causal : undefined);
  for (const { name, options } of parsed.wrappers) {
    const wrapper = wrappers[name];
    if (wrapper === undefined) {
      throw new UnsupportedError(
        `router "${label}": unknown wrapper "${name}"; the wrappers are ${wrapperNames.join(", ")}`,
      );
    }
    plugin = wrapper(plugin, Object.fromEntries(options));
    checkOptions(plugin, options, name);
    refuseUnfit(plugin, label, name === "capacity" ? "policy=position" : undefined);
  }
  const hooks = parsed.isFile || !Object.hasOwn(known, head) ? undefined : known[head]?.hooks;
  return { label, plugin, specification, ...(digest === undefined ? {} : { digest }), ...(hooks ? { hooks } : {}) };
}

async function innermost(parsed: Specification, folder: string): Promise<{ plugin: RouterPlugin; digest?: string }> {
  const { head, isFile, label } = parsed;
  const options = Object.fromEntries(parsed.options);
  const router = isFile || !Object.hasOwn(known, head) ? undefined : known[head];
  if (router) return { plugin: router.make({ ...router.defaults, ...options }) };
  const file = isFile ? head : fileOfPackage(head, folder);
  if (file === undefined) {
    throw new UnsupportedError(
      `unknown router "${head}"; the routers are ${routerNames.join(", ")}; a file is named by its path (./my-router.ts), and no ` +
        `package of that name is installed for ${folder}`,
    );
  }
  return routerOfFile(file, { name: label, options });
}

function refuseUnfit(plugin: RouterPlugin, label: string, remedy: string | undefined): void {
  const others = `use one of ${causalRouters().join(", ")}`;
  const need = unmet(plugin);
  if (need !== undefined) {
    throw new UnsupportedError(`router "${label}" needs ${need}, which a text model does not have; ${others}`);
  }
  if (isCausal(plugin)) return;
  throw new UnsupportedError(
    `router "${label}" chooses by looking at later tokens, which would leak the text to be predicted into a language model; ` +
      `${remedy === undefined ? others : `with ${remedy} it looks back only, or ${others}`}`,
  );
}

/** The routers of a list. @throws UnsupportedError when one stands in it twice. */
export async function routersFrom(
  specifications: readonly string[],
  folder: string = process.cwd(),
): Promise<readonly NamedRouter[]> {
  const routers: NamedRouter[] = [];
  for (const one of specifications) routers.push(await routerFrom(one, folder));
  const labels = routers.map(({ label }) => label);
  const twice = labels.find((label, i) => labels.indexOf(label) !== i);
  if (twice !== undefined) throw new UnsupportedError(`router "${twice}" is named twice`);
  return routers;
}

/** Experts and their inner size at equal active parameters: two experts per token of the size's width, or the same in other portions. */
export function expertSizes(
  plugin: RouterPlugin,
  { experts, expertWidth }: { readonly experts: number; readonly expertWidth: number },
): { readonly experts: number; readonly expertWidth: number } {
  const { expertsPerToken = 2, sharedExperts = 0 } = plugin;
  const perToken = expertsPerToken + sharedExperts;
  const sized = {
    experts: (experts * perToken) / 2 - sharedExperts,
    expertWidth: (expertWidth * 2) / perToken,
  };
  if (!Number.isInteger(sized.experts) || !Number.isInteger(sized.expertWidth) || sized.experts < 1) {
    throw new UnsupportedError(
      `router ${plugin.name} with ${perToken} experts per token: experts of ${(2 * expertWidth) / perToken} would be needed for equal ` +
        `active parameters; choose a number that divides ${2 * expertWidth}, such as 1, 2 or 4`,
    );
  }
  return sized;
}
