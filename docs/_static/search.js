/* A word that the site doesn't have is taken for the nearest one that it has: "softmx" for "softmax". */

/* Letters to add, leave out, change or swap with the next one until one word is the other. */
function distance(a, b) {
  let before = [], row = [...Array(b.length + 1).keys()];
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next[j] = Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + (a[i - 1] !== b[j - 1]));
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1])
        next[j] = Math.min(next[j], before[j - 2] + 1);
    }
    [before, row] = [row, next];
  }
  return row[b.length];
}

/* Words of titles and names come first, then stems of those of the text. Long words may differ by two letters. */
function nearest(word, lists) {
  if (word.length < 4 || /[^a-z]/.test(word) || stopwords.has(word)) return word;
  const stem = new Stemmer().stemWord(word);
  if (lists.some((list) => list.some((known) => known.includes(stem)))) return word;
  for (let most = 1; most <= (word.length < 8 ? 1 : 2); most++)
    for (const list of lists) {
      const found = list.find((known) => distance(list === lists[0] ? word : stem, known) <= most);
      if (found) return found;
    }
  return word;
}

const asTyped = Search.query;
Search.query = (query) => {
  const { titles, titleterms, terms, indexentries } = Search._index;
  const names = [...Object.values(titles), ...Object.keys(indexentries)];
  const whole = names.join(" ").toLowerCase().match(/[a-z]+/g);
  const lists = [whole, Object.keys(titleterms), Object.keys(terms)];
  const meant = query.toLowerCase().replace(/[a-z]+/g, (word) => nearest(word, lists));
  if (meant !== query.toLowerCase()) {
    const said = document.createElement("p");
    said.textContent = `No page has “${query}”. These are the results for “${meant}”.`;
    document.getElementById("search-results").prepend(said);
    query = meant;
  }
  asTyped(query);
};

/* A result names the part of the page that it leads to, and no name is there twice. The best result comes last. */
const allFound = Search._performSearch;
Search._performSearch = (...asked) => {
  const { alltitles, docnames } = Search._index;
  const parts = {};
  for (const [part, places] of Object.entries(alltitles))
    for (const [file, id] of places) parts[`${docnames[file]}#${id}`] = part;
  const named = ([page, title, anchor, ...rest]) => {
    const part = parts[page + anchor];
    const whole = !part || part === title || title.includes(" > ");
    return [page, whole ? title : `${title} > ${part}`, anchor, ...rest];
  };
  const seen = new Set();
  const once = ([, title]) => !seen.has(title) && seen.add(title);
  return allFound(...asked).map(named).reverse().filter(once).reverse();
};
