// Looks at pages as a person with a browser does, and plays the page that means them harm. Reads what to do
// from standard input, says what it saw on standard output, both JSON.
import { mkdirSync, readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { createRequire } from 'node:module';
import { chromium } from 'playwright-core';

const { address, name, password, pages, forge, shots } = JSON.parse(readFileSync(0, 'utf8'));
const axe = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');
const seen = { pages: [], foreign: [], dialogs: 0, violations: [], errors: [] };

const browser = await chromium.launch({
  executablePath: '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync'],
});
const context = await browser.newContext({ viewport: { width: 1440, height: 900 } });
const page = await context.newPage();
page.on('dialog', (dialog) => { seen.dialogs += 1; dialog.dismiss(); });
page.on('request', (request) => { if (!request.url().startsWith(address)) seen.foreign.push(request.url()); });
page.on('console', (message) => {
  if (/Content Security Policy|Refused to/i.test(message.text())) seen.violations.push(message.text());
});

await page.goto(`${address}/login`);
await page.fill('#name', name);
await page.fill('#password', password);
await Promise.all([page.waitForNavigation(), page.click('main button')]);

if (shots) mkdirSync(shots, { recursive: true });
for (const path of pages) {
  const answer = await page.goto(`${address}${path}`);
  const look = { path, status: answer.status(), title: await page.title(), wide: [], faults: [] };
  for (const [width, scheme] of [[390, 'light'], [768, 'dark'], [1440, 'light'], [1440, 'dark']]) {
    await page.setViewportSize({ width, height: 900 });
    await page.emulateMedia({ colorScheme: scheme });
    if (await page.evaluate(() => document.documentElement.scrollWidth > window.innerWidth + 1)) look.wide.push(width);
    if (shots) {
      const file = `${shots}/${path.replace(/[^a-z0-9]+/gi, '-') || 'home'}-${width}-${scheme}.png`;
      await page.screenshot({ path: file, fullPage: true });
    }
    // The judge is put in through the remote control, not through the page: the page's policy is untouched.
    const found = await page.evaluate(`${axe}; axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa'] })`);
    look.faults.push(...found.violations.map((v) => `${width} ${scheme} ${v.id}: ${v.nodes[0].html.slice(0, 120)}`));
  }
  // Whatever gets into a page as markup does nothing.
  await page.evaluate(() => {
    const made = document.createElement('div');
    made.innerHTML = '<img src="/nothing" onerror="alert(1)"><svg onload="alert(2)"></svg>';
    document.body.append(made);
    const script = document.createElement('script');
    script.textContent = 'alert(3)';
    document.body.append(script);
  });
  await page.waitForTimeout(100);
  look.stopped = seen.violations.length;
  seen.violations.length = 0;
  seen.pages.push(look);
}

// Another origin sends our forms, with the person's browser.
const evil = createServer((request, response) => {
  response.setHeader('content-type', 'text/html');
  const kind = new URL(request.url, 'http://x').searchParams.get('kind');
  const fields = Object.entries(forge.fields).map(([k, v]) => `<input name="${k}" value="${v}">`).join('');
  response.end(kind === 'form'
    ? `<form method="post" action="${address}${forge.path}">${fields}</form><script>document.forms[0].submit()</script>`
    : `<script>
        fetch('${address}${forge.api}', {method: 'POST', credentials: 'include', headers: {'content-type': 'text/plain'}, body: '{}'})
          .then((a) => document.title = 'status ' + a.status, (e) => document.title = 'failed');
       </script>`);
});
await new Promise((ready) => evil.listen(0, '127.0.0.1', ready));
const enemy = `http://127.0.0.1:${evil.address().port}`;
seen.foreign.length = 0;
const other = await context.newPage();
const posted = other.waitForResponse((answer) => answer.url() === `${address}${forge.path}`);
await other.goto(`${enemy}/?kind=form`).catch(() => {});
seen.forged = (await posted).status();
await other.goto(`${enemy}/?kind=fetch`);
await other.waitForFunction(() => document.title !== '');
seen.fetched = await other.title();
const framed = await context.newPage();
await framed.setContent(`<iframe src="${address}/login"></iframe>`);
await framed.waitForTimeout(500);
seen.framed = framed.frames().some((frame) => frame.url().startsWith(`${address}/login`) && frame !== framed.mainFrame());
seen.cookies = (await context.cookies(address)).map(({ name, httpOnly, sameSite, path }) => ({ name, httpOnly, sameSite, path }));
evil.close();
await browser.close();
console.log(JSON.stringify(seen));
