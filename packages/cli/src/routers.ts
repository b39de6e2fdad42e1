// Routers by name: "topK", "topK:k=1", "topK:k=4:order=topk-softmax". The factories are those of @switchyard/routers.
import { UnsupportedError } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import {
  adaMoE,
  attentionAware,
  deepSeekV2,
  deepSeekV3,
  dynMoLE,
  expertChoice,
  expertRace,
  expressiveGates,
  grin,
  gshard,
  hash,
  noisyTopK,
  nullExperts,
  reMoE,
  similarityAware,
  sinkhorn,
  softMoE,
  switchRouter,
  topK,
  topP,
  xMoE,
} from "@switchyard/routers";

interface Known {
  /** The factory. It checks its options itself. */
  make(options: object): RouterPlugin;
  /** Options that it requires. */
  readonly defaults: Readonly<Record<string, OptionValue>>;
}

type OptionValue = string | number | boolean;

const known: Readonly<Record<string, Known>> = {
  topK: { make: topK, defaults: { k: 2 } },
  switchRouter: { make: switchRouter, defaults: {} },
  reMoE: { make: reMoE, defaults: { k: 2 } },
  expertChoice: { make: expertChoice, defaults: {} },
  topP: { make: topP, defaults: {} },
  sinkhorn: { make: sinkhorn, defaults: { k: 2 } },
  similarityAware: { make: similarityAware, defaults: { k: 2 } },
  attentionAware: { make: attentionAware, defaults: { k: 2 } },
  // Tokens of a language model must not compete with later ones.
  expertRace: { make: expertRace, defaults: { k: 2, training: "threshold" } },
  // As many token ids as the largest size has.
  hash: { make: hash, defaults: { vocabulary: 4096 } },
  noisyTopK: { make: noisyTopK, defaults: { k: 2 } },
  nullExperts: { make: nullExperts, defaults: { k: 4 } },
  adaMoE: { make: adaMoE, defaults: { k: 6 } },
  expressiveGates: { make: expressiveGates, defaults: { k: 2, balance: 0.01 } },
  xMoE: { make: xMoE, defaults: {} },
  grin: { make: grin, defaults: { k: 2 } },
  softMoE: { make: softMoE, defaults: {} },
  deepSeekV3: { make: deepSeekV3, defaults: { k: 2 } },
  deepSeekV2: { make: deepSeekV2, defaults: { k: 2 } },
  dynMoLE: { make: dynMoLE, defaults: {} },
  // Later tokens must not take the places of earlier ones.
  gshard: { make: gshard, defaults: { order: "tokens" } },
};

/** Names of all routers, those included that a language model refuses. */
export const routerNames: readonly string[] = Object.keys(known);

/** What `switchyard train` compares when nothing is said. */
export const defaultRouters: readonly string[] = ["topK", "switchRouter", "reMoE"];

function value(text: string): OptionValue {
  if (text === "true" || text === "false") return text === "true";
  const number = Number(text);
  return text.trim() === "" || Number.isNaN(number) ? text : number;
}

export interface NamedRouter {
  /** As the user wrote it. */
  readonly label: string;
  readonly plugin: RouterPlugin;
}

/**
 * Makes the router that a specification names.
 * @throws UnsupportedError for an unknown name (it lists the known ones), an unknown option, or a router that looks ahead.
 */
export function routerFrom(specification: string): NamedRouter {
  const [name = "", ...parts] = specification.trim().split(":");
  const router = known[name];
  if (router === undefined) {
    throw new UnsupportedError(`unknown router "${name}"; the routers are ${routerNames.join(", ")}`);
  }
  const given = parts.map((part): [string, OptionValue] => {
    const [option = "", ...rest] = part.split("=");
    if (option === "" || rest.length === 0) {
      throw new UnsupportedError(
        `router "${specification}": "${part}" is not option=value; write for example topK:k=2`,
      );
    }
    return [option, value(rest.join("="))];
  });
  const plugin = router.make({ ...router.defaults, ...Object.fromEntries(given) });
  const options = Object.keys(plugin.options ?? {});
  const wrong = given.find(([option]) => !options.includes(option));
  if (wrong !== undefined) {
    throw new UnsupportedError(
      `router "${specification}": ${name} has no option "${wrong[0]}"; its options are ${options.join(", ")}`,
    );
  }
  if (!plugin.causal.training || !plugin.causal.evaluation) {
    throw new UnsupportedError(
      `router "${name}" chooses by looking at later tokens, which would leak the text to be predicted into a language model; ` +
        `use one of ${routerNames.filter((other) => other !== name).join(", ")}`,
    );
  }
  return { label: specification.trim(), plugin };
}

/** The routers of a list. @throws UnsupportedError when one stands in it twice. */
export function routersFrom(specifications: readonly string[]): readonly NamedRouter[] {
  const routers = specifications.map(routerFrom);
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
  const perToken = plugin.expertsPerToken ?? 2;
  const sized = { experts: (experts * perToken) / 2, expertWidth: (expertWidth * 2) / perToken };
  if (!Number.isInteger(sized.experts) || !Number.isInteger(sized.expertWidth)) {
    throw new UnsupportedError(
      `router ${plugin.name} with ${perToken} experts per token: experts of ${(2 * expertWidth) / perToken} would be needed for equal ` +
        `active parameters; choose a number that divides ${2 * expertWidth}, such as 1, 2 or 4`,
    );
  }
  return sized;
}
