// Places go to those who asked first, and those who give up leave the queue.
import { setTimeout as sleep } from "node:timers/promises";
import { expect, test } from "vitest";
import { turns } from "./turns.ts";

test("passes of several requests alternate, one at a time", async () => {
  const passes = turns(1);
  const order: string[] = [];
  let inside = 0;
  const request = async (name: string, count: number): Promise<void> => {
    for (let i = 0; i < count; i++) {
      await passes.take(undefined, async () => {
        expect(++inside).toBe(1);
        await sleep(1);
        order.push(`${name}${i}`);
        inside--;
      });
    }
  };
  await Promise.all([request("a", 4), request("b", 2), request("c", 3)]);
  expect(order).toEqual(["a0", "b0", "c0", "a1", "b1", "c1", "a2", "c2", "a3"]);
  expect([passes.running, passes.waiting]).toEqual([0, 0]);
});

test("as many run at once as there are places", async () => {
  const places = turns(3);
  let inside = 0;
  let most = 0;
  const seen: number[] = [];
  await Promise.all(
    Array.from({ length: 10 }, (_, i) =>
      places.take(undefined, async () => {
        seen.push(i);
        most = Math.max(most, ++inside);
        await sleep(1);
        inside--;
      }),
    ),
  );
  expect([most, seen]).toEqual([3, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]);
});

test("who is aborted while waiting leaves the queue, and a failure frees the place", async () => {
  const places = turns(1);
  const control = new AbortController();
  const first = places.take(undefined, async () => {
    await sleep(5);
    throw new Error("broken");
  });
  const second = places.take(control.signal, async () => "never");
  const third = places.take(undefined, async () => "done");
  expect([places.running, places.waiting]).toEqual([1, 2]);
  control.abort(new Error("gone"));
  await expect(second).rejects.toThrow("gone");
  expect(places.waiting).toBe(1);
  await expect(first).rejects.toThrow("broken");
  expect(await third).toBe("done");
  await expect(places.take(control.signal, async () => "never")).rejects.toThrow("gone");
  expect([places.running, places.waiting]).toEqual([0, 0]);
});
