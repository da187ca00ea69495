/* Residency intervals as pixels: intervals are counted per pixel, so every zoom takes the same time and shows exact shares. */
kvscope.raster = (() => {
  const opened = new WeakMap();

  /* Intervals by head, sorted by key, with the index of each key's first interval; `leave` is `length` for a key that is never evicted. */
  async function unpack(each, length) {
    const [leave, key, enter] = await Promise.all(["leave", "key", "enter"].map((name) => (each[name] ? kvscope.numbers(each[name]) : null)));
    const made = [];
    let at = 0;
    for (let index = 0; index < each.stored; index += 1) {
      const count = each.counts ? each.counts[index] : length;
      const keys = key ? key.subarray(at, at + count) : Int32Array.from({ length }, (_, i) => i);
      const first = new Int32Array(length + 1);
      for (const one of keys) first[one + 1] += 1;
      for (let one = 0; one < length; one += 1) first[one + 1] += first[one];
      made.push({ first, enter: enter ? enter.subarray(at, at + count) : keys, leave: leave.subarray(at, at + count) });
      at += count;
    }
    return { length, heads: Array.from({ length: each.heads }, (_, index) => made[Math.min(index, made.length - 1)]), oneForAll: each.stored < each.heads };
  }
  function open(each, length) {
    if (!opened.has(each)) opened.set(each, unpack(each, length));
    return opened.get(each);
  }

  /* The intervals of one key in one head, as [enter, leave] pairs. */
  function intervalsOf(head, key) {
    const found = [];
    for (let place = head.first[key]; place < head.first[key + 1]; place += 1) found.push([head.enter[place], head.leave[place]]);
    return found;
  }
  const holds = (head, key, step) => intervalsOf(head, key).some(([from, to]) => from <= step && step < to);

  /* Share of the keys of each pixel that are held, and whether any exists: +1 where an interval begins, -1 where it ends. */
  function shares(heads, view, width, height) {
    const held = new Float32Array((width + 1) * height);
    const there = new Float32Array((width + 1) * height);
    const { k0, k1, t0, t1 } = view;
    const x = (step) => Math.round(((Math.min(Math.max(step, t0), t1) - t0) / (t1 - t0)) * width);
    for (const { first, enter, leave } of heads) {
      for (let key = k0; key < k1; key += 1) {
        const top = Math.floor(((key - k0) / (k1 - k0)) * height);
        const bottom = Math.max(top + 1, Math.floor(((key + 1 - k0) / (k1 - k0)) * height));
        for (let row = top * (width + 1); row < bottom * (width + 1); row += width + 1) {
          there[row + x(key)] += 1;
          for (let place = first[key]; place < first[key + 1]; place += 1) {
            held[row + x(enter[place])] += 1;
            held[row + x(leave[place])] -= 1;
          }
        }
      }
    }
    const share = new Float32Array(width * height);
    for (let y = 0; y < height; y += 1) {
      let [holding, existing] = [0, 0];
      for (let column = 0; column < width; column += 1) {
        const at = y * (width + 1) + column;
        holding += held[at];
        existing += there[at];
        share[y * width + column] = existing > 0 ? holding / existing : -1;
      }
    }
    return share;
  }

  function rgb(hex) {
    return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  }
  /* `mix(at, weights)` sets the weight of each colour in a pixel; false for one that stays transparent. */
  function paint(context, width, height, colours, mix) {
    const made = context.createImageData(width, height);
    const { data } = made;
    const channels = colours.map(rgb);
    const weights = new Float32Array(colours.length);
    for (let at = 0; at < width * height; at += 1) {
      if (!mix(at, weights)) continue;
      for (let c = 0; c < 3; c += 1) {
        let sum = 0;
        for (let one = 0; one < weights.length; one += 1) sum += weights[one] * channels[one][c];
        data[4 * at + c] = sum;
      }
      data[4 * at + 3] = 255;
    }
    return made;
  }

  /* `kept` where all keys of a pixel are held, `missing` where none is held, transparent where none exists. */
  function image(context, share, width, height, kept, missing) {
    return paint(context, width, height, [kept, missing], (at, weights) => {
      weights[0] = share[at];
      weights[1] = 1 - share[at];
      return share[at] >= 0;
    });
  }
  /* Who holds more: `mine`, `only` the other, `both` or `neither`. */
  function difference(context, one, other, width, height, colours) {
    return paint(context, width, height, colours, (at, weights) => {
      const [a, b] = [one[at], other[at]];
      weights[0] = Math.max(a - b, 0);
      weights[1] = Math.max(b - a, 0);
      weights[2] = Math.min(a, b);
      weights[3] = 1 - Math.max(a, b);
      return a >= 0;
    });
  }

  return { difference, holds, image, open, shares, intervalsOf };
})();
