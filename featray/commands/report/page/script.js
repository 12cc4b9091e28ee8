"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (selector, from = document) => [...from.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  const svgNames = "http://www.w3.org/2000/svg";
  const hits = new Set();
  let column = data.columns[0];

  /* Marks and cells: one tab stop per chart, arrow keys inside it. */
  function moveFocus(from, to) {
    if (!to || from === to) return;
    from.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  }
  function listenToKeys(body) {
    const isGrid = body.dataset.keys === "grid";
    const rows = find("tr", body).map((row) => find("[tabindex]", row));
    const last = (list) => list.length - 1;
    body.addEventListener("keydown", (event) => {
      const row = rows.findIndex((cells) => cells.includes(event.target));
      if (row < 0) return;
      const place = rows[row].indexOf(event.target);
      const clamp = (value, top) => Math.max(0, Math.min(top, value));
      const to = {
        ArrowUp: () => rows[clamp(row - 1, last(rows))][place],
        ArrowDown: () => rows[clamp(row + 1, last(rows))][place],
        ArrowLeft: () => (isGrid ? rows[row][clamp(place - 1, last(rows[row]))] : null),
        ArrowRight: () => (isGrid ? rows[row][clamp(place + 1, last(rows[row]))] : null),
        Home: () => (isGrid ? rows[row][0] : rows[0][0]),
        End: () => (isGrid ? rows[row][last(rows[row])] : rows[last(rows)][0]),
      }[event.key];
      if (!to) return;
      event.preventDefault();
      moveFocus(event.target, to());
    });
    body.addEventListener("focusin", (event) => {
      if (!event.target.hasAttribute("tabindex")) return;
      find('[tabindex="0"]', body).forEach((mark) => { mark.tabIndex = -1; });
      event.target.tabIndex = 0;
      const readout = body.closest("figure").querySelector("p.readout");
      if (readout) readout.textContent = event.target.getAttribute("aria-label");
    });
  }
  find("[data-keys]").forEach(listenToKeys);

  /* One chart per label. */
  find("[data-switch]").forEach((box) => {
    const figures = find(":scope > figure", box);
    const show = (number) => figures.forEach((figure, place) => figure.classList.toggle("on", place === number));
    const select = byId(box.dataset.switch);
    if (select) select.addEventListener("change", () => show(Number(select.value)));
    show(0);
  });

  /* Maps. */
  function getMark(scan) {
    const code = column.codes[scan];
    return code === "-" ? [7, "na"] : column.legend[Number(code)].slice(1);
  }
  function describe(scan) {
    const parts = data.columns.filter((part) => part.name).slice(0, 8).map((part) => {
      const value = part.values[scan];
      return `${part.name} ${value === null || value === undefined ? "–" : value}`;
    });
    const own = parts.findIndex((_, place) => data.columns[place] === column);
    if (own > 0) parts.unshift(...parts.splice(own, 1));
    return [data.ids[scan], ...parts].join(" · ");
  }
  const maps = find(".map").map((element, number) => {
    const xy = data.maps[number];
    const scans = data.ids.map((_, scan) => scan).filter((scan) => xy[2 * scan] !== null);
    const figure = element.closest("figure");
    return {
      element, xy, scans, cursor: -1,
      readout: figure.querySelector(".readout"),
      byX: [...scans].sort((a, b) => xy[2 * a] - xy[2 * b]),
      byY: [...scans].sort((a, b) => xy[2 * b + 1] - xy[2 * a + 1]),
      marks: new Map(find("use", element).map((mark) => [Number(mark.dataset.s), mark])),
    };
  });
  function paintCanvas(map) {
    const pen = map.element.getContext("2d");
    const style = getComputedStyle(root);
    const read = (name) => style.getPropertyValue(`--${name}`).trim();
    const scale = map.element.width / 400;
    const paths = [...Array(8).keys()].map((shape) => new Path2D(byId(`m${shape}`).getAttribute("d")));
    const [edge, soft, hit, ink] = ["edge", "soft", "hit", "ink"].map(read);
    const colors = {};
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, map.element.width, map.element.height);
    const size = map.scans.length > 2000 ? 0.6 : 1;
    const draw = (scan) => {
      const [shape, name] = getMark(scan);
      pen.setTransform(scale * size, 0, 0, scale * size, map.xy[2 * scan] * scale, map.xy[2 * scan + 1] * scale);
      pen.lineWidth = hits.has(scan) ? 4 : name === "na" ? 1 : 0.6;
      pen.strokeStyle = hits.has(scan) ? hit : name === "na" ? soft : edge;
      if (name !== "na") {
        pen.fillStyle = colors[name] = colors[name] || read(name);
        pen.fill(paths[shape]);
      }
      pen.stroke(paths[shape]);
    };
    map.scans.filter((scan) => !hits.has(scan)).forEach(draw);
    map.scans.filter((scan) => hits.has(scan)).forEach(draw);
    if (map.cursor < 0) return;
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.strokeStyle = ink;
    pen.lineWidth = 2;
    pen.beginPath();
    pen.arc(map.xy[2 * map.cursor], map.xy[2 * map.cursor + 1], 9, 0, 7);
    pen.stroke();
  }
  function paint(map) {
    if (map.element.localName === "canvas") { paintCanvas(map); return; }
    map.marks.forEach((mark, scan) => {
      const [shape, name] = getMark(scan);
      mark.setAttribute("href", `#m${shape}`);
      mark.setAttribute("class", hits.has(scan) ? `${name} hit` : name);
    });
  }
  function setCursor(map, scan) {
    map.cursor = scan;
    map.readout.textContent = scan < 0 ? "" : describe(scan);
    if (map.element.localName === "canvas") { paintCanvas(map); return; }
    const ring = map.element.querySelector(".cursor");
    ring.setAttribute("cx", scan < 0 ? -99 : map.xy[2 * scan]);
    ring.setAttribute("cy", scan < 0 ? -99 : map.xy[2 * scan + 1]);
  }
  function findNearest(map, event) {
    const box = map.element.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * 400;
    const y = ((event.clientY - box.top) / box.height) * 400;
    let best = -1;
    let least = 14 * 14;
    map.scans.forEach((scan) => {
      const distance = (map.xy[2 * scan] - x) ** 2 + (map.xy[2 * scan + 1] - y) ** 2;
      if (distance < least) { least = distance; best = scan; }
    });
    return best;
  }
  maps.forEach((map) => {
    const step = (order, by) => {
      if (!order.length) return;
      const place = order.indexOf(map.cursor);
      const next = place < 0 ? 0 : Math.max(0, Math.min(order.length - 1, place + by));
      setCursor(map, order[next]);
    };
    map.element.addEventListener("keydown", (event) => {
      const act = {
        ArrowLeft: () => step(map.byX, -1), ArrowRight: () => step(map.byX, 1),
        ArrowUp: () => step(map.byY, 1), ArrowDown: () => step(map.byY, -1),
        Home: () => step(map.byX, -Infinity), End: () => step(map.byX, Infinity),
        Enter: () => map.cursor >= 0 && search(data.ids[map.cursor]),
        Escape: () => setCursor(map, -1),
      }[event.key];
      if (!act) return;
      event.preventDefault();
      act();
    });
    map.element.addEventListener("focus", () => {
      if (map.cursor < 0 && map.element.matches(":focus-visible")) step(map.byX, 0);
    });
    map.element.addEventListener("pointermove", (event) => {
      const scan = findNearest(map, event);
      if (scan >= 0 && scan !== map.cursor) setCursor(map, scan);
    });
    map.element.addEventListener("click", (event) => {
      const scan = findNearest(map, event);
      if (scan >= 0) { setCursor(map, scan); search(data.ids[scan]); }
    });
  });
  function drawLegend() {
    const list = byId("legend");
    if (!list) return;
    const hasMissing = column.codes.includes("-");
    const entries = hasMissing ? [...column.legend, ["missing", 7, "na"]] : column.legend;
    list.replaceChildren(...entries.map(([text, shape, name]) => {
      const item = document.createElement("li");
      const swatch = document.createElementNS(svgNames, "svg");
      const mark = document.createElementNS(svgNames, "use");
      Object.entries({ class: "swatch", width: 16, height: 16, "aria-hidden": "true" })
        .forEach(([key, value]) => swatch.setAttribute(key, value));
      Object.entries({ href: `#m${shape}`, x: 8, y: 8, class: name })
        .forEach(([key, value]) => mark.setAttribute(key, value));
      swatch.append(mark);
      const words = document.createElement("bdi");
      words.textContent = text;
      item.append(swatch, words);
      return item;
    }));
  }
  const color = byId("color");
  function recolor() {
    if (color) column = data.columns[Number(color.value)];
    drawLegend();
    maps.forEach(paint);
  }
  if (color) color.addEventListener("change", recolor);
  const repaint = () => maps.filter((map) => map.element.localName === "canvas").forEach(paintCanvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

  /* The table of a map gets all its rows when it is opened. */
  maps.forEach((map, number) => {
    const details = map.element.closest("figure").querySelector("details");
    details.addEventListener("toggle", () => {
      const body = details.querySelector("tbody");
      const table = data.tables && data.tables[number];
      if (!details.open || details.dataset.full || !table) return;
      details.dataset.full = "yes";
      const rows = map.scans.map((scan) => {
        const row = document.createElement("tr");
        const name = document.createElement("th");
        name.scope = "row";
        name.textContent = data.ids[scan];
        row.append(name, ...[0, 1].map((axis) => {
          const cell = document.createElement("td");
          cell.textContent = table[2 * scan + axis].toPrecision(3).replace("-", "−");
          return cell;
        }));
        return row;
      });
      body.replaceChildren(...rows);
      find(".note", details).forEach((note) => note.remove());
    });
  });

  /* Neighbors. */
  function makeTile(scan, caption) {
    const item = document.createElement("li");
    item.dataset.s = scan;
    if (hits.has(scan)) item.classList.add("hit");
    if (byId(`i${scan}`)) {
      const picture = document.createElementNS(svgNames, "svg");
      const use = document.createElementNS(svgNames, "use");
      picture.setAttribute("class", "slice");
      picture.setAttribute("role", "img");
      picture.setAttribute("aria-label", `Middle slice of ${data.ids[scan]}`);
      use.setAttribute("href", `#i${scan}`);
      use.setAttribute("width", "100%");
      use.setAttribute("height", "100%");
      picture.append(use);
      item.append(picture);
    }
    const name = document.createElement("bdi");
    name.className = "id";
    name.title = name.textContent = data.ids[scan];
    const words = document.createElement("span");
    words.textContent = caption;
    item.append(name, words);
    return item;
  }
  const query = byId("query");
  function showNeighbors() {
    if (!query) return;
    const place = Number(query.value);
    byId("near-query").replaceChildren(makeTile(data.queries[place], "the chosen scan"));
    ["left", "right"].forEach((side) => {
      const layer = byId(`layer-${side}`);
      if (!layer) return;
      const { measure, lists } = data.neighbors[Number(layer.value)];
      byId(`near-${side}-name`).textContent = `Nearest in ${layer.selectedOptions[0].textContent}, ${measure}`;
      byId(`near-${side}`).replaceChildren(...lists[place].map(([scan, distance]) => makeTile(scan, distance)));
    });
  }
  [query, byId("layer-left"), byId("layer-right")].forEach((select) => {
    if (select) select.addEventListener("change", showNeighbors);
  });

  /* Search. */
  const box = byId("search");
  const found = byId("found");
  const next = byId("next");
  let turn = -1;
  const findPlaces = () => find("[data-s].hit").concat(maps
    .filter((map) => map.element.localName === "canvas" && map.scans.some((scan) => hits.has(scan)))
    .map((map) => map.element))
    .filter((place) => place.getClientRects().length)
    .sort((a, b) => (a.compareDocumentPosition(b) & 4 ? -1 : 1));
  function findScans(text) {
    const exact = data.ids.indexOf(text);
    if (exact >= 0) return [exact];
    const small = text.toLowerCase();
    return data.ids.map((_, scan) => scan).filter((scan) => data.ids[scan].toLowerCase().includes(small));
  }
  function highlight() {
    const text = box.value.trim();
    const matches = text ? findScans(text) : [];
    hits.clear();
    matches.slice(0, 50).forEach((scan) => hits.add(scan));
    if (matches.length === 1 && query) {
      const place = data.queries.indexOf(matches[0]);
      if (place >= 0) { query.value = place; showNeighbors(); }
    }
    find("[data-s]").forEach((element) => element.classList.toggle("hit", hits.has(Number(element.dataset.s))));
    repaint();
    byId("matches").replaceChildren(...matches.slice(0, 12).map((scan) => {
      const option = document.createElement("option");
      option.value = data.ids[scan];
      return option;
    }));
    turn = -1;
    const places = findPlaces();
    next.disabled = !places.length;
    found.textContent = !text ? "" : !matches.length ? "No scan has this id." :
      `${matches.length === 1 ? data.ids[matches[0]] : `${matches.length} scans`}, highlighted in ${places.length} places` +
      (matches.length > 50 ? " (the first 50 scans)" : "");
  }
  function search(text) {
    if (!box) return;
    box.value = text;
    highlight();
  }
  function goToNext() {
    const places = findPlaces();
    if (!places.length) return;
    turn = (turn + 1) % places.length;
    places[turn].scrollIntoView({ block: "center" });
    found.textContent = `Place ${turn + 1} of ${places.length}`;
  }
  if (box) {
    let timer = 0;
    box.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(highlight, 120); });
    box.form.addEventListener("submit", (event) => { event.preventDefault(); highlight(); goToNext(); });
    next.addEventListener("click", goToNext);
    document.addEventListener("click", (event) => {
      const item = event.target.closest("li[data-s]");
      if (item) search(data.ids[Number(item.dataset.s)]);
    });
  }
  recolor();
})();
