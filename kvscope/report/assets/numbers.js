/* Packed numbers and texts: base64 of deflated bytes. Inflating is asynchronous, so everything here is. */
Object.assign(kvscope, (() => {
  const opened = new WeakMap();
  const SIZES = { uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array, int32: Int32Array, float16: Uint16Array };
  const NOTHING = 65535;
  let halves = null;

  async function inflate(base64) {
    const text = atob(base64);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  }
  async function inflateText(base64) {
    return new TextDecoder().decode(await inflate(base64));
  }

  /* Every 16-bit float as a number. */
  function half() {
    if (halves) return halves;
    halves = new Float32Array(65536);
    for (let bits = 0; bits < 65536; bits += 1) {
      const [sign, exponent, part] = [bits & 0x8000 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
      halves[bits] = exponent === 31 ? (part ? NaN : sign * Infinity) : exponent ? sign * 2 ** (exponent - 15) * (1 + part / 1024) : sign * 2 ** -14 * (part / 1024);
    }
    return halves;
  }

  async function unpack(value) {
    const raw = new SIZES[value.dtype](await inflate(value.data));
    if (value.dtype === "float16") return Float32Array.from(raw, (bits) => half()[bits]);
    if (!("low" in value)) return raw;
    const step = (value.high - value.low) / (NOTHING - 1);
    return Float64Array.from(raw, (at) => (at === NOTHING ? NaN : value.low + at * step));
  }

  /* The numbers of a packed value, as one flat typed array; each is inflated once. */
  function numbers(value) {
    if (!opened.has(value)) opened.set(value, unpack(value));
    return opened.get(value);
  }

  return { inflateText, numbers };
})());
