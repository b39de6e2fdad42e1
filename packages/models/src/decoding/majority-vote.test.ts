import { expect, it } from "vitest";
import { majorityVote } from "./majority-vote.ts";

it("takes the most frequent answer, of equals the first", () => {
  expect(majorityVote(["7", "8", "8", "7", "8"])).toEqual({ answer: "8", votes: 3 });
  expect(majorityVote(["b", "a", "a", "b", "c"])).toEqual({ answer: "b", votes: 2 });
  expect(majorityVote([""])).toEqual({ answer: "", votes: 1 });
});

it("lets samples without an answer not vote, however many they are", () => {
  expect(majorityVote([undefined, "7", undefined])).toEqual({ answer: "7", votes: 1 });
  expect(majorityVote([undefined])).toBeUndefined();
  expect(majorityVote([])).toBeUndefined();
});
