// The search of the site. It works on a server and from disk: the index comes as a script, since a page that was opened
// from disk may neither start a worker nor request a file. A section is found if it contains every word of the query,
// also as a part of a name ("hook_z", "attention(").
document.addEventListener("DOMContentLoaded", function () {
  "use strict";
  var LIMIT = 40;
  var input = document.getElementById("mkdocs-search-query");
  var list = document.getElementById("mkdocs-search-results");
  var sections = null;

  function load(then) {
    if (sections) return then();
    var script = document.createElement("script");
    script.src = base_url + "/search/index.js";
    script.onload = function () {
      sections = window.search_sections;
      then();
    };
    document.head.appendChild(script);
  }

  function words(query) {
    return query.toLowerCase().split(/\s+/).filter(Boolean);
  }

  // Higher is better, 0 if a word is missing: titles count most, whole words more than parts, then how often.
  function score(section, wanted) {
    var title = section.title.toLowerCase(), text = section.text.toLowerCase(), sum = 0;
    for (var i = 0; i < wanted.length; i++) {
      var often = text.split(wanted[i]).length - 1, place = title.indexOf(wanted[i]);
      if (place < 0 && !often) return 0;
      if (title === wanted[i]) sum += 40;
      else if (place === 0) sum += 20;
      else if (place > 0) sum += 10;
      sum += Math.min(often, 5);
    }
    return sum;
  }

  // Add a text to an element with the words of the query marked.
  function marked(element, text, wanted) {
    var pattern = wanted.map(function (word) { return word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"); }).join("|");
    text.split(new RegExp("(" + pattern + ")", "gi")).forEach(function (part, i) {
      if (i % 2) element.appendChild(document.createElement("mark")).textContent = part;
      else element.appendChild(document.createTextNode(part));
    });
    return element;
  }

  function excerpt(text, wanted) {
    var places = wanted.map(function (word) { return text.toLowerCase().indexOf(word); });
    var first = Math.min.apply(null, places.filter(function (place) { return place >= 0; }));
    var start = isFinite(first) ? Math.max(0, first - 60) : 0;
    return (start ? "… " : "") + text.slice(start, start + 200).replace(/\s+/g, " ");
  }

  function show() {
    var wanted = words(input.value);
    list.replaceChildren();
    if (input.value.trim().length < 2) return;
    var found = sections.map(function (section) { return [score(section, wanted), section]; })
      .filter(function (pair) { return pair[0]; }).sort(function (a, b) { return b[0] - a[0]; });
    if (!found.length) list.appendChild(document.createElement("p")).textContent = "Nothing on the site contains this.";
    found.slice(0, LIMIT).forEach(function (pair) {
      var section = pair[1], entry = list.appendChild(document.createElement("article"));
      var link = entry.appendChild(document.createElement("h3")).appendChild(document.createElement("a"));
      link.href = base_url + "/" + section.location;
      marked(link, section.title, wanted);
      if (section.page !== section.title) {
        entry.firstChild.appendChild(document.createElement("small")).textContent = section.page;
      }
      marked(entry.appendChild(document.createElement("p")), excerpt(section.text, wanted), wanted);
    });
    if (found.length > LIMIT) {
      list.appendChild(document.createElement("p")).textContent = found.length - LIMIT + " more; add a word.";
    }
  }

  input.addEventListener("input", function () { load(show); });
  input.form.addEventListener("submit", function (event) {  // Enter opens the first result
    event.preventDefault();
    var first = list.querySelector("a");
    if (first) first.click();
  });
  document.getElementById("mkdocs_search_modal").addEventListener("show.bs.modal", function () { load(function () {}); });
});
