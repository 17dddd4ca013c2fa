// The backend of TestApps: the servers of several applications, each as it comes from npm,
// told apart by the first segment of the path. The second is the namespace.
//
//   /ws          y-websocket
//   /collab      hocuspocus
//   /d, /doc     y-sweet's paths, with y-websocket's server behind them
//   /socket.io   socket.io
//   /hub         SignalR, by the program of e2e/apps/signalr, which comes from Go's modules
//   /socket      what phoenix.js asks for: a WebSocket, or long polls
//   /api         plain HTTP: server-sent events, streams, and large bodies
//
// It writes a line of JSON for each message that it has handled: the test compares these
// lines with what the clients have sent.
//
// BACKEND  its name; default: that of the host
// PORT     where it listens; 0: any; default: 9000
// SIGNALR  the program for /hub; default: none
import { spawn } from 'node:child_process'
import { createHash, randomUUID } from 'node:crypto'
import { createServer, request } from 'node:http'
import { connect } from 'node:net'
import { hostname } from 'node:os'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { Hocuspocus } from '@hocuspocus/server'
import { getYDoc, setContentInitializor, setupWSConnection } from '@y/websocket-server/utils'
import { Server as SocketIO } from 'socket.io'
import { WebSocketServer } from 'ws'
import * as Y from 'yjs'

const backend = process.env.BACKEND || hostname()
const port = Number(process.env.PORT ?? 9000)

// handled writes down that a message of an application was handled here.
function handled(app, namespace, n) {
  console.log(JSON.stringify({ app, namespace, n, backend }))
}

// segments returns those of a request's path, decoded once.
function segments(req) {
  const path = req.url.split('?')[0]
  return path.slice(1).split('/').map(decodeURIComponent)
}

function query(req, name) {
  return new URL(req.url, 'http://backend').searchParams.get(name)
}

function answer(res, value, status = 200) {
  res.writeHead(status, { 'Content-Type': 'application/json' })
  res.end(JSON.stringify(value))
}

async function body(req) {
  const chunks = []
  for await (const chunk of req) chunks.push(chunk)
  return Buffer.concat(chunks)
}

// --- documents: y-websocket, y-sweet, hocuspocus

// Each backend that has had a document open has an entry in it.
setContentInitializor(async doc => { doc.getMap('backends').set(backend, true) })

const hocuspocus = new Hocuspocus({
  quiet: true,
  async onLoadDocument({ document }) { document.getMap('backends').set(backend, true) }
})

// sweetSocket is y-websocket's protocol, and the message with which y-sweet's client asks
// whether the server has got all that was sent before.
function sweetSocket(ws, req) {
  const syncStatus = 102
  ws.on('message', data => {
    if (data[0] === syncStatus) ws.send(data)
  })
  setupWSConnection(ws, req, { docName: 'sweet/' + segments(req)[1] })
}

// sweetPaths are y-sweet's plain requests about one document.
async function sweetPaths(req, res) {
  const [, id, what] = segments(req)
  const doc = getYDoc('sweet/' + id)
  switch (what) {
    case 'auth': {
      const secure = req.headers['x-forwarded-proto'] === 'https' ? 's' : ''
      const at = `://${req.headers['x-forwarded-host'] || req.headers.host}/d/${encodeURIComponent(id)}`
      return answer(res, { url: `ws${secure}${at}/ws`, baseUrl: `http${secure}${at}`, docId: id, token: 'token' })
    }
    case 'as-update':
      res.writeHead(200, { 'Content-Type': 'application/octet-stream' })
      return res.end(Y.encodeStateAsUpdate(doc))
    case 'update':
      Y.applyUpdate(doc, await body(req))
      return answer(res, {})
  }
  answer(res, { error: 'not found' }, 404)
}

// --- SignalR

// startSignalR starts the server of SignalR, and returns its process and its port. Its
// standard input ends with this program, however that ends, and it ends with that.
async function startSignalR(program) {
  const child = spawn(program, { env: { ...process.env, BACKEND: backend }, stdio: ['pipe', 'inherit', 'pipe'] })
  child.on('exit', () => process.exit(1))
  const port = await new Promise(resolve => {
    createInterface({ input: child.stderr }).on('line', line => {
      console.error('signalr: ' + line)
      const listening = /^listening on port (\d+)$/.exec(line)
      if (listening) resolve(Number(listening[1]))
    })
  })
  return { child, port }
}

const signalR = process.env.SIGNALR ? await startSignalR(process.env.SIGNALR) : null

// signalRSocket passes on all bytes of a WebSocket, those of its handshake too.
function signalRSocket(req, socket, head) {
  const server = connect({ port: signalR.port, host: '127.0.0.1', allowHalfOpen: true })
  const fields = []
  for (let i = 0; i < req.rawHeaders.length; i += 2) fields.push(`${req.rawHeaders[i]}: ${req.rawHeaders[i + 1]}\r\n`)
  server.write(`GET ${req.url} HTTP/1.1\r\n${fields.join('')}\r\n`)
  server.write(head)
  socket.on('error', () => server.destroy())
  server.on('error', () => socket.destroy())
  socket.pipe(server).pipe(socket)
}

// signalRRequest passes on a plain request, and its answer as it comes.
function signalRRequest(req, res) {
  const { method, url: path, headers } = req
  const forwarded = request({ port: signalR.port, host: '127.0.0.1', method, path, headers }, answer => {
    answer.on('error', () => res.destroy())
    res.writeHead(answer.statusCode, answer.headers)
    answer.pipe(res)
  })
  forwarded.on('error', () => res.destroy())
  res.on('close', () => forwarded.destroy())
  req.pipe(forwarded)
}

// --- Phoenix channels

// phoenixReply is the reply to one message, which is "msg" or one of phoenix.js's own.
function phoenixReply(app, namespace, text) {
  const [joinRef, ref, topic, event, payload] = JSON.parse(text)
  if (event === 'msg') handled(app, namespace, payload.n)
  return JSON.stringify([joinRef, ref, topic, 'phx_reply', { status: 'ok', response: { backend } }])
}

function phoenixSocket(ws, req) {
  const [, namespace] = segments(req)
  ws.on('message', data => ws.send(phoenixReply('phoenix', namespace, data.toString())))
}

const phoenixSessions = new Map() // by their tokens: what waits for the client's next poll

// phoenixLongPoll answers as Phoenix.Transports.LongPoll does: 410 and a new token to who
// has no session here, 204 to a poll for which there is nothing within its window.
async function phoenixLongPoll(req, res) {
  const [, namespace] = segments(req)
  const session = phoenixSessions.get(query(req, 'token'))
  if (!session) {
    const token = randomUUID()
    phoenixSessions.set(token, { replies: [], wake() {} })
    return answer(res, { status: 410, token, messages: [] })
  }
  if (req.method === 'POST') {
    for (const line of (await body(req)).toString().split('\n')) {
      session.replies.push(phoenixReply('phoenix-longpoll', namespace, line))
    }
    session.wake()
    return answer(res, { status: 200 })
  }
  if (session.replies.length === 0) {
    await new Promise(resolve => {
      const timer = setTimeout(resolve, 5000)
      session.wake = () => { clearTimeout(timer); resolve() }
    })
  }
  const messages = session.replies.splice(0)
  answer(res, { status: messages.length ? 200 : 204, token: query(req, 'token'), messages })
}

// --- plain HTTP

const page = '<!doctype html><meta charset="utf-8"><title>events</title><p>events</p>'

// events sends a numbered event every 100 ms, after the last that the client has got.
async function events(req, res) {
  res.writeHead(200, { 'Content-Type': 'text/event-stream', 'Cache-Control': 'no-store' })
  res.write('retry: 200\n\n')
  let n = Number(req.headers['last-event-id'] || 0)
  while (!res.destroyed) {
    n++
    res.write(`id: ${n}\ndata: ${JSON.stringify({ n, backend })}\n\n`)
    await sleep(100)
  }
}

// lines sends numbered lines, one every so many milliseconds.
async function lines(req, res) {
  const count = Number(query(req, 'count'))
  res.writeHead(200, { 'Content-Type': 'application/x-ndjson' })
  for (let n = 1; n <= count && !res.destroyed; n++) {
    res.write(JSON.stringify({ n, backend }) + '\n')
    await sleep(Number(query(req, 'every')))
  }
  res.end()
}

// readLines handles the lines of a request as they come.
async function readLines(req, res, namespace) {
  let rest = ''
  for await (const chunk of req) {
    const got = (rest + chunk).split('\n')
    rest = got.pop()
    for (const line of got) handled('lines', namespace, JSON.parse(line).n)
  }
  answer(res, { backend })
}

const block = Buffer.alloc(1 << 16, 'router') // what a download consists of

// download sends so many blocks within so many milliseconds.
async function download(req, res) {
  const blocks = Number(query(req, 'blocks'))
  const every = Number(query(req, 'within')) / 100
  res.writeHead(200, { 'Content-Type': 'application/octet-stream', 'Content-Length': blocks * block.length, 'X-Backend': backend })
  for (let n = 0; n < blocks && !res.destroyed; n++) {
    if (!res.write(block)) await new Promise(resolve => res.once('drain', resolve).once('close', resolve))
    if (n % Math.ceil(blocks / 100) === 0) await sleep(every)
  }
  res.end()
}

async function upload(req, res, namespace) {
  const hash = createHash('sha256')
  let bytes = 0
  for await (const chunk of req) {
    hash.update(chunk)
    bytes += chunk.length
  }
  handled('upload', namespace, bytes)
  answer(res, { backend, bytes, sha256: hash.digest('hex') })
}

async function api(req, res) {
  const [, namespace, what] = segments(req)
  switch (`${req.method} ${what}`) {
    case 'GET page':
      res.writeHead(200, { 'Content-Type': 'text/html' })
      return res.end(page)
    case 'GET backend': return answer(res, { backend })
    case 'GET events': return events(req, res)
    case 'GET lines': return lines(req, res)
    case 'POST lines': return readLines(req, res, namespace)
    case 'GET blob': return download(req, res)
    case 'PUT blob': return upload(req, res, namespace)
  }
  answer(res, { error: 'not found' }, 404)
}

// --- the server

const requests = { api, d: sweetPaths, doc: sweetPaths, socket: phoenixLongPoll }
if (signalR) requests.hub = signalRRequest
const sockets = {
  ws: (ws, req) => setupWSConnection(ws, req),
  collab: (ws, req) => hocuspocus.handleConnection(ws, req),
  d: sweetSocket,
  socket: phoenixSocket
}

const server = createServer(async (req, res) => {
  const [app] = segments(req)
  if (app === 'healthz') return answer(res, 'ok')
  try {
    await (requests[app] || ((_, res) => answer(res, { error: 'not found' }, 404)))(req, res)
  } catch (err) {
    res.destroy(err) // the client has left, or the request was cut
  }
})

const wss = new WebSocketServer({ noServer: true })
server.on('upgrade', (req, socket, head) => {
  const [app] = segments(req)
  if (app === 'hub' && signalR) return signalRSocket(req, socket, head)
  const open = sockets[app]
  if (open) wss.handleUpgrade(req, socket, head, ws => open(ws, req))
})

const io = new SocketIO(server, { path: '/socket.io', destroyUpgrade: false })
io.on('connection', socket => {
  const { url, query, headers } = socket.handshake
  const namespace = segments({ url })[1] || query.doc || headers.host.split('.')[0]
  let ticks = 0
  const timer = setInterval(() => socket.emit('tick', ++ticks), 100)
  socket.on('disconnect', () => clearInterval(timer))
  socket.on('message', (n, done) => {
    handled('socket.io', namespace, n)
    done(backend)
  })
})

process.on('SIGTERM', () => {
  for (const ws of wss.clients) ws.close(1001)
  signalR?.child.kill()
  io.close()
  server.close()
  setTimeout(() => process.exit(0), 500)
})
server.listen(port, () => console.error(`serving on port ${server.address().port} as ${backend}`))
