/* The selection that all panels share, also stored in the address: #panel?run=0.3&layer=2. Every value is validated. */
kvscope.state = (() => {
  const rules = new Map(); // name -> {usual, valid}, in order of dependence
  const values = new Map();
  const listeners = [];
  let given = new Map(); // from the address, for rules that are not declared yet
  let panel = "";

  /* `valid` returns the value to use, or undefined for an invalid one; `usual` returns a default that is always valid. */
  function declare(name, usual, valid) {
    rules.set(name, { usual, valid });
    values.set(name, checked(name, given.get(name)));
  }
  function checked(name, value) {
    const { usual, valid } = rules.get(name);
    const good = value === undefined || value === null ? undefined : valid(value);
    return good === undefined ? usual() : good;
  }
  function get(name) { return values.get(name); }

  function set(changes) {
    const before = new Map(values);
    for (const [name, value] of Object.entries(changes)) if (rules.has(name)) values.set(name, value);
    for (const name of rules.keys()) values.set(name, checked(name, values.get(name)));
    write();
    const changed = new Set([...rules.keys()].filter((name) => values.get(name) !== before.get(name)));
    for (const { names, handler } of listeners) if (names.some((name) => changed.has(name))) handler(changed);
  }
  function on(names, handler) { listeners.push({ names, handler }); }

  function write() {
    const parts = new URLSearchParams();
    for (const name of rules.keys()) if (values.get(name) !== rules.get(name).usual()) parts.set(name, String(values.get(name)));
    for (const [name, value] of given) if (!rules.has(name)) parts.set(name, value); // of panels that are not drawn yet
    const query = String(parts);
    const hash = `#${panel}${query ? `?${query}` : ""}`;
    if (hash === (location.hash || "#")) return;
    try {
      history.replaceState(null, "", hash);
    } catch (error) {
      if (error.name !== "SecurityError") throw error; // a page inside a frame without an address of its own
    }
  }

  /* Reads the address; returns the id of the panel that it names. */
  function read() {
    const [name, query = ""] = location.hash.slice(1).split("?");
    panel = name;
    given = new Map(new URLSearchParams(query));
    return panel;
  }
  /* Follows a link of this page or a changed address. */
  function follow() {
    const query = location.hash.includes("?");
    read();
    if (query) set(Object.fromEntries([...rules.keys()].map((rule) => [rule, given.get(rule)])));
    else write();
    return panel;
  }
  /* Names the panel in the address. */
  function go(name) {
    panel = name;
    write();
  }

  const oneOf = (list) => (value) => list().find((each) => String(each) === String(value));
  const whole = (low, high) => (value) => {
    const found = Number(value);
    return Number.isInteger(found) && found >= low() && found <= high() ? found : undefined;
  };
  return { declare, follow, get, go, on, oneOf, read, set, whole };
})();
