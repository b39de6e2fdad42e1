import { dispose, engine, leaves } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { routerContext, testRouter } from "@switchyard/testing";
import { expect, it } from "vitest";
import { lossFree } from "./loss-free.ts";

testRouter({ plugin: ({ k = 2 }) => lossFree({ k }), weights: "sum to 1" });

it("the bias of a busy expert falls, that of an idle one rises", async () => {
  const on = engine(cpu({ precision: 64 }));
  const router = lossFree({ k: 1, rate: 0.5 }).init(routerContext(on, { experts: 3 }));
  const statistics = { step: 0, tokens: 6, load: Float64Array.of(4, 2, 0), metrics: {} };
  const next = on.scope(() => router.afterStep?.([statistics], router.buffers) ?? {});
  expect([...((await leaves(next)[0]?.[1].data()) ?? [])]).toEqual([-0.5, 0, 0.5]);
  dispose([router.params, router.buffers, next]);
});
