// The messages of a rocket: what each type means, and what they add up to.

import {nameOf, number} from "./format.js";

// A type says of a message: its sign; what it tells, and the name in it; how it changes the
// speed; and the mission from then on.
const nothing = () => null;
export const MESSAGE_TYPES = {
  __proto__: null,
  RocketLaunched: {
    sign: "●",
    tell: ({launchSpeed}) => `Launched at ${number(launchSpeed)} for`,
    name: ({mission}) => mission,
    change: () => 0,
    mission: ({mission}) => mission,
  },
  RocketSpeedIncreased: {
    sign: "▲",
    tell: ({by}) => `Speed +${number(by)}`,
    name: nothing,
    change: ({by}) => by,
    mission: nothing,
  },
  RocketSpeedDecreased: {
    sign: "▼",
    tell: ({by}) => `Speed −${number(by)}`,
    name: nothing,
    change: ({by}) => -by,
    mission: nothing,
  },
  RocketExploded: {
    sign: "✖",
    tell: () => "Exploded:",
    name: ({reason}) => reason,
    change: () => 0,
    mission: nothing,
  },
  RocketMissionChanged: {
    sign: "◆",
    tell: () => "Mission is now",
    name: ({newMission}) => newMission,
    change: () => 0,
    mission: ({newMission}) => newMission,
  },
};
const UNKNOWN = {sign: "", tell: nothing, name: nothing, change: () => 0, mission: nothing};

/** Return what a message tells: a sign, a text, and the name in it or null. */
export function tell({type, message}) {
  const kind = MESSAGE_TYPES[type] ?? UNKNOWN;
  return {sign: kind.sign, text: kind.tell(message) ?? type, name: kind.name(message)};
}

export function describe(entry) {
  const {text, name} = tell(entry);
  return name === null ? text : `${text} \u2068${nameOf(name)}\u2069`;
}

/**
 * Return an entry for each message, by number: {number, time, type, message, missing, speed,
 * mission}. missing counts the numbers not received before it; speed is what the messages up to
 * it add up to, and null before the launch; mission is null if it names none.
 */
export function trace(messages) {
  const sorted = [...messages].sort((a, b) => a.metadata.messageNumber - b.metadata.messageNumber);
  const launched = sorted.find(({metadata}) => metadata.messageType === "RocketLaunched");
  let sum = 0;
  let isLaunched = false;
  let last = 0;
  return sorted.map((item) => {
    const {metadata: {messageNumber, messageTime, messageType}, message} = item;
    const kind = MESSAGE_TYPES[messageType] ?? UNKNOWN;
    isLaunched ||= item === launched;
    sum += kind.change(message);
    const missing = messageNumber - last - 1;
    last = messageNumber;
    return {
      number: messageNumber, time: messageTime, type: messageType, message, missing,
      speed: isLaunched ? launched.message.launchSpeed + sum : null,
      mission: kind.mission(message),
    };
  });
}

const MOST_RANGES = 8;

/**
 * Return the ranges in which numbers of a trace are missing, the newest first. Neighbours are
 * joined until there are few, so that what comes late is read without the rest.
 */
export function missingRanges(entries) {
  let ranges = entries.filter(({missing}) => missing > 0)
    .map(({number: before, missing}) => ({after: before - missing - 1, before}));
  for (let near = 16; ranges.length > MOST_RANGES; near *= 2) {
    const joined = [];
    for (const range of ranges) {
      const last = joined.at(-1);
      if (last && range.after - last.before < near) last.before = range.before;
      else joined.push({...range});
    }
    ranges = joined;
  }
  return ranges.reverse();
}
