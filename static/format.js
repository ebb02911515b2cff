// Numbers, times and names as people read them.

// The prototype is null, so that a name such as "constructor" is not found in this table.
export const STATUSES = {
  __proto__: null,
  active: "Active",
  awaiting_launch: "Awaiting launch",
  exploded: "Exploded",
};

// These are made once, as making them takes most of the time of writing with them.
const NUMBERS = new Intl.NumberFormat("en");
const SECONDS = new Intl.DateTimeFormat("sv", {dateStyle: "short", timeStyle: "medium"});
const ZONED = new Intl.DateTimeFormat("sv", {dateStyle: "short", timeStyle: "long"});

export const number = (value) => NUMBERS.format(value).replace("-", "−");

export const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

const UNITS = [  // the least milliseconds for which a unit is used, its length, its name
  [2 * 86400e3, 86400e3, "days"],
  [2 * 3600e3, 3600e3, "h"],
  [60e3, 60e3, "min"],
  [0, 1e3, "s"],
];

/** Tell how long milliseconds are: "5 s", "3 min". What is begun does not count. */
export function duration(milliseconds) {
  const [, length, name] = UNITS.find(([least]) => milliseconds >= least) ?? UNITS.at(-1);
  return `${number(Math.max(0, Math.floor(milliseconds / length)))} ${name}`;
}

/** Return a local date and time, as "2026-11-25 14:03:39". */
export const local = (time) => SECONDS.format(new Date(time));

/** Return a local date and time with its zone. */
export const exact = (time) => ZONED.format(new Date(time));

/** Return a name, or what to say in its place. */
export function nameOf(name) {
  if (name === null) return "unknown";
  return /^[\s\p{C}\p{M}\u115f\u1160\u2800\u3164\uffa0]*$/u.test(name) ? "blank" : name;
}

/** Return a name that cannot turn the text around it, for places that hold no element. */
export const isolated = (name) => `\u2068${nameOf(name)}\u2069`;

export const titleOf = ({type, channel}) => `${isolated(type)} ${channel.slice(0, 8)}`;
