// A certified provider, as it is: one client, people by whatever name they type, groups out of a file.
import { readFileSync } from 'node:fs';
import Provider from 'oidc-provider';

const { ISSUER, PORT, REDIRECT, HOME, GROUPS } = process.env;
const scopes = ['openid', 'profile', 'email', 'groups'];
const provider = new Provider(ISSUER, {
  clients: [{
    client_id: 'bulkhead',
    client_secret: 'the-secret-of-the-client',
    redirect_uris: [REDIRECT],
    post_logout_redirect_uris: [HOME],
  }],
  scopes,
  claims: { openid: ['sub'], profile: ['name', 'preferred_username'], email: ['email'], groups: ['groups'] },
  conformIdTokenClaims: false,
  pkce: { required: () => true },
  cookies: { keys: ['for tests alone'] },
  findAccount: (ctx, id) => ({
    accountId: id,
    claims: () => ({
      sub: id,
      name: `Person ${id}`,
      preferred_username: id,
      email: `${id}@example.org`,
      groups: JSON.parse(readFileSync(GROUPS, 'utf8'))[id] ?? [],
    }),
  }),
  // Consent is the installation's own affair here.
  async loadExistingGrant(ctx) {
    const { client, session } = ctx.oidc;
    const grant = new ctx.oidc.provider.Grant({ clientId: client.clientId, accountId: session.accountId });
    grant.addOIDCScope(scopes.join(' '));
    await grant.save();
    return grant;
  },
});
provider.listen(Number(PORT), '127.0.0.1', () => console.log('ready'));
