// The helpers that the layers of other libraries rely on.
import { expect, it } from "vitest";
import { hostDispatch, transposed } from "./host-dispatch.ts";

it("hostDispatch sorts slots by expert, in order within each", () => {
  // tokens 0, 1, 2 choose experts (2, 0), (0, 2), (2, 3); expert 1 gets none
  expect(hostDispatch([2, 0, 0, 2, 2, 3], 4, 2)).toEqual({
    sizes: [2, 0, 3, 1],
    tokens: Int32Array.of(0, 1, 0, 1, 2, 2),
    places: Int32Array.of(2, 0, 1, 3, 4, 5),
  });
});

it("transposed swaps rows and columns", () => {
  expect(transposed(Float32Array.of(1, 2, 3, 4, 5, 6), 2, 3)).toEqual(Float32Array.of(1, 4, 2, 5, 3, 6));
});
