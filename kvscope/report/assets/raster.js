/* Stays of keys as pixels: stays are counted per pixel, so any zoom costs the same and shows true shares. */
kvscope.raster = (() => {
  const opened = new Map();

  /* Stays by head, sorted by key, with the place of each key's first stay. */
  function open(each, length) {
    if (opened.has(each)) return opened.get(each);
    const leave = kvscope.integers(each.leave);
    const key = each.key ? kvscope.integers(each.key) : null;
    const enter = each.enter ? kvscope.integers(each.enter) : null;
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
    opened.set(each, made);
    return made;
  }

  /* Held keys and keys there per pixel: +1 where a stay begins, -1 where it ends; sums along a row give the counts. */
  function changes(heads, view, width, height) {
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
          for (let stay = first[key]; stay < first[key + 1]; stay += 1) {
            held[row + x(enter[stay])] += 1;
            held[row + x(leave[stay] < 0 ? t1 : leave[stay])] -= 1;
          }
        }
      }
    }
    return { held, there };
  }

  function rgb(hex) {
    return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  }

  /* Picture of a view: the colour `kept` where all keys of a pixel are held, `gone` where none is, clear where none exists. */
  function image(context, heads, view, width, height, kept, gone) {
    const { held, there } = changes(heads, view, width, height);
    const made = context.createImageData(width, height);
    const [full, none] = [rgb(kept), rgb(gone)];
    for (let y = 0; y < height; y += 1) {
      let [holding, existing] = [0, 0];
      for (let x = 0; x < width; x += 1) {
        const at = y * (width + 1) + x;
        holding += held[at];
        existing += there[at];
        if (existing <= 0) continue;
        const to = 4 * (y * width + x);
        for (let c = 0; c < 3; c += 1) made.data[to + c] = none[c] + (full[c] - none[c]) * (holding / existing);
        made.data[to + 3] = 255;
      }
    }
    return made;
  }

  return { image, open };
})();
