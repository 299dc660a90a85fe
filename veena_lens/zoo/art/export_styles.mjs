// Writes the face drawings of DiceBear styles as SVG text with the face parts cut out, one JSON file a style.
// npm i @dicebear/core@9 @dicebear/collection@9; node export_styles.mjs OUT
import { createAvatar } from '@dicebear/core';
import fs from 'node:fs';
import path from 'node:path';
import { gzipSync } from 'node:zlib';

const HAIR = { black: '2a2a2a', brown: '7a4a28', blonde: 'e6c05c', red: 'b5391f', gray: 'b9b9b9', pink: 'f08fb4' };
const SKIN = ['f8d9c4', 'f2c49b', 'dba27a', 'b87a50', '8d5524', '5f3a1e'];
const STYLES = {
  'toon-head': { parts: ['mouth', 'eyes', 'eyebrows'], count: 160,
    options: { beardProbability: 15, rearHairProbability: 50, hairProbability: 100 } },
  'adventurer': { parts: ['mouth', 'eyes', 'eyebrows'], count: 200,
    options: { glassesProbability: 35, glasses: ['variant02', 'variant03', 'variant04', 'variant05'], earringsProbability: 20, featuresProbability: 10, hairProbability: 100 } },
  'big-smile': { parts: ['mouth', 'eyes'], count: 100,
    options: { accessories: ['glasses'], accessoriesProbability: 30,
      hair: ['shortHair','mohawk','wavyBob','bowlCutHair','curlyBob','straightHair','braids','bunHair','froBun','bangs','curlyShortHair'] } },
  'open-peeps': { parts: ['face'], count: 60,
    options: { accessoriesProbability: 30, accessories: ['glasses', 'glasses2', 'glasses3'], facialHairProbability: 10, maskProbability: 0,
      head: ['afro','bangs','bangs2','bun','bun2','cornrows','dreads1','flatTop','long','longAfro','longCurly','medium1','medium2','mediumBangs','mediumStraight','pomp','short1','short2','short3','short4','short5','twists'] } },
  'micah': { parts: ['mouth', 'eyes', 'eyebrows'], count: 60,
    options: { glassesProbability: 30, facialHairProbability: 0, earringsProbability: 20, hairProbability: 100, hair: ['fonze','dougFunny','dannyPhantom','full','pixie'],
      eyesColor: ['000000'], eyebrowsColor: ['000000'], eyeShadowColor: ['d2eff3'], mouthColor: ['000000'] } },
};
const out = process.argv[2];
fs.mkdirSync(out, { recursive: true });
for (const [name, spec] of Object.entries(STYLES)) {
  const root = path.join('node_modules', '@dicebear', name);
  const style = await import(path.resolve(root, 'lib/index.js'));
  const parts = {};
  for (const part of spec.parts) {
    const module = await import(path.resolve(root, `lib/components/${part}.js`));
    parts[part] = { ...module[part] };
    for (const key of Object.keys(module[part])) module[part][key] = () => `@@${part}@@`;
  }
  const colors = { mouth: '#000000', eyes: '#000000', eyebrows: '#000000', eyeShadow: '#d2eff3', hair: '#2a2a2a', head:'#000', skin: '#f2c49b', base: '#f2c49b' };
  const drawn = {};
  for (const part of spec.parts) {
    drawn[part] = {};
    for (const [key, draw] of Object.entries(parts[part])) {
      try { drawn[part][key] = draw({}, colors); } catch (e) { console.log('skip', name, part, key, e.message); }
    }
  }
  const identities = [];
  for (let i = 0; i < spec.count; i++) {
    const hair = Object.keys(HAIR)[i % 6];
    const options = { seed: `veena-${i}`, hairColor: [HAIR[hair]], headContrastColor: [HAIR[hair]], skinColor: SKIN, baseColor: SKIN, ...spec.options };
    const avatar = createAvatar(style, options);
    const extra = avatar.toJson().extra;
    const svg = avatar.toString().replace(/<metadata[\s\S]*?<\/metadata>/, '');
    identities.push({ hair, extra, svg });
  }
  const missing = spec.parts.filter(p => !identities.every(x => x.svg.includes(`@@${p}@@`)));
  if (missing.length) console.log(name, 'placeholders missing', missing);
  const text = JSON.stringify({ style: name, parts: drawn, identities });
  fs.writeFileSync(path.join(out, `${name}.json.gz`), gzipSync(text, { level: 9 }));
  fs.copyFileSync(path.join(root, 'LICENSE'), path.join(out, `${name}.LICENSE`));
  console.log(name, text.length, fs.statSync(path.join(out, `${name}.json.gz`)).size, JSON.stringify(identities[0].extra));
}
