// The messages of a rocket: what each type means, and what they add up to.

import {isolated, number} from "./format.js";

// By type: what it tells, with the name in it or null; whether "by" adds to the speed or takes from
// it; and the field that names a mission.
const MESSAGE_TYPES = {
  RocketLaunched: {
    tell: ({launchSpeed, mission}) => [`Launched at ${number(launchSpeed)} for`, mission],
    mission: "mission",
  },
  RocketSpeedIncreased: {tell: ({by}) => [`Speed +${number(by)}`, null], by: 1},
  RocketSpeedDecreased: {tell: ({by}) => [`Speed −${number(by)}`, null], by: -1},
  RocketExploded: {tell: ({reason}) => ["Exploded:", reason]},
  RocketMissionChanged: {
    tell: ({newMission}) => ["Mission is now", newMission],
    mission: "newMission",
  },
};

/** Return what a message tells: a text, and the name in it or null. */
export const tell = ({type, message}) => MESSAGE_TYPES[type].tell(message);

export function describe(entry) {
  const [text, name] = tell(entry);
  return name === null ? text : `${text} ${isolated(name)}`;
}

/**
 * Return an entry for each message, by number: {number, time, type, message, missing, speed,
 * mission}. missing counts the numbers not received before it; speed is what the messages up to
 * it add up to, and null before the launch; mission is null if it names none.
 */
export function trace(messages) {
  const sorted = [...messages].sort((a, b) => a.metadata.messageNumber - b.metadata.messageNumber);
  let last = 0;
  let changes = 0;
  let launchSpeed = null;
  return sorted.map(({metadata, message}) => {
    const {messageNumber, messageTime: time, messageType: type} = metadata;
    const kind = MESSAGE_TYPES[type];
    if (kind.by) changes += kind.by * message.by;
    if (type === "RocketLaunched") launchSpeed ??= message.launchSpeed;
    const speed = launchSpeed === null ? null : launchSpeed + changes;
    const missing = messageNumber - last - 1;
    last = messageNumber;
    const mission = message[kind.mission] ?? null;
    return {number: messageNumber, time, type, message, missing, speed, mission};
  });
}

const SEPARATE = 50;  // ranges; each is a request

/** Return the ranges in which numbers are missing, the newest first, and the oldest as one. */
export function missingRanges(entries) {
  const gaps = entries.filter(({missing}) => missing > 0).reverse()
    .map(({number: before, missing}) => ({after: before - missing - 1, before}));
  const old = gaps.splice(SEPARATE);
  return old.length ? [...gaps, {after: old.at(-1).after, before: old[0].before}] : gaps;
}
