// Where values stand on an axis, and what is written there.

// Round numbers between low and high: at steps of 1, 2 or 5 times a power of ten; on a logarithmic axis those alone.
const ticks = (low, high, log) => {
  const found = [];
  if (log) {
    const leaves = high / low > 60 ? [1] : high / low > 8 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 7];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const leaf of leaves) found.push(leaf * 10 ** power);
  }
  const inside = found.filter(tick => tick >= low * 0.999 && tick <= high * 1.001);
  if (inside.length >= 2) return inside;
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(leaf => leaf * power >= rough) * power;
  const even = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++)
    even.push(Number((k * step).toPrecision(12)));
  return even;
};

// {place, marks, words}: numbers at themselves, words side by side, over `size` pixels from `start`.
// log: logarithmic where positive numbers span more than a factor of three.
const scale = (values, start, size, log) => {
  const numbers = values.filter(value => typeof value === "number");
  if (numbers.length < values.length || !values.length) {
    const words = [...new Set(values)];
    const place = value => start + size * (words.indexOf(value) + 0.5) / Math.max(words.length, 1);
    return { place, marks: words.map(word => [place(word), String(word)]), words: true };
  }
  let low = Math.min(...numbers), high = Math.max(...numbers);
  const spread = log && low > 0 && high > 3 * low;
  if (low === high) [low, high] = low ? [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1] : [-1, 1];
  const warp = spread ? Math.log : value => value;
  const margin = 0.05 * (warp(high) - warp(low)), from = warp(low) - margin, to = warp(high) + margin;
  const place = value => start + size * (warp(value) - from) / (to - from);
  return { place, marks: ticks(low, high, spread).map(tick => [place(tick), number(tick)]), words: false };
};
