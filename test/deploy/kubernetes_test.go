package deploy

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/test/process"
)

// What the manifest may say, by the names of Kubernetes' API. A name that is not here is an error, as it is for a server with strict
// field validation: a misspelt field would be one that does not hold.
type (
	object struct {
		APIVersion string `yaml:"apiVersion"`
		Kind       string
		Metadata   metadata
	}
	metadata struct {
		Name   string
		Labels map[string]string
	}
	selector struct {
		MatchLabels map[string]string `yaml:"matchLabels"`
	}
	job struct {
		object `yaml:",inline"`
		Spec   struct {
			BackoffLimit            int `yaml:"backoffLimit"`
			TTLSecondsAfterFinished int `yaml:"ttlSecondsAfterFinished"`
			Template                podTemplate
		}
	}
	configMap struct {
		object `yaml:",inline"`
		Data   map[string]string
	}
	deployment struct {
		object `yaml:",inline"`
		Spec   struct {
			Replicas int
			Selector selector
			Strategy struct {
				RollingUpdate struct {
					MaxUnavailable *int `yaml:"maxUnavailable"`
					MaxSurge       int  `yaml:"maxSurge"`
				} `yaml:"rollingUpdate"`
			}
			Template podTemplate
		}
	}
	podTemplate struct {
		Metadata metadata
		Spec     struct {
			RestartPolicy                 string `yaml:"restartPolicy"`
			TerminationGracePeriodSeconds int    `yaml:"terminationGracePeriodSeconds"`
			AutomountServiceAccountToken  *bool  `yaml:"automountServiceAccountToken"`
			SecurityContext               struct {
				RunAsNonRoot   bool                  `yaml:"runAsNonRoot"`
				RunAsUser      int                   `yaml:"runAsUser"`
				RunAsGroup     int                   `yaml:"runAsGroup"`
				FSGroup        int                   `yaml:"fsGroup"`
				SeccompProfile struct{ Type string } `yaml:"seccompProfile"`
			} `yaml:"securityContext"`
			TopologySpreadConstraints []struct {
				MaxSkew           int      `yaml:"maxSkew"`
				TopologyKey       string   `yaml:"topologyKey"`
				WhenUnsatisfiable string   `yaml:"whenUnsatisfiable"`
				LabelSelector     selector `yaml:"labelSelector"`
			} `yaml:"topologySpreadConstraints"`
			Containers []container
			Volumes    []struct {
				Name      string
				ConfigMap *struct {
					Name     string
					Optional bool
				} `yaml:"configMap"`
				Secret *struct {
					SecretName string `yaml:"secretName"`
					Items      []struct{ Key, Path string }
				}
				EmptyDir *struct {
					SizeLimit string `yaml:"sizeLimit"`
				} `yaml:"emptyDir"`
			}
		}
	}
	container struct {
		Name, Image string
		Args        []string
		Env         []struct {
			Name, Value string
			ValueFrom   struct {
				SecretKeyRef struct{ Name, Key string } `yaml:"secretKeyRef"`
			} `yaml:"valueFrom"`
		}
		Ports []struct {
			Name          string
			ContainerPort int `yaml:"containerPort"`
		}
		LivenessProbe   probe `yaml:"livenessProbe"`
		ReadinessProbe  probe `yaml:"readinessProbe"`
		Resources       struct{ Requests, Limits struct{ CPU, Memory string } }
		SecurityContext struct {
			AllowPrivilegeEscalation *bool `yaml:"allowPrivilegeEscalation"`
			ReadOnlyRootFilesystem   bool  `yaml:"readOnlyRootFilesystem"`
			Capabilities             struct{ Drop []string }
		} `yaml:"securityContext"`
		VolumeMounts []struct {
			Name      string
			MountPath string `yaml:"mountPath"`
			ReadOnly  bool   `yaml:"readOnly"`
		} `yaml:"volumeMounts"`
	}
	probe struct {
		HTTPGet struct{ Path, Port string } `yaml:"httpGet"`

		PeriodSeconds    int `yaml:"periodSeconds"`
		FailureThreshold int `yaml:"failureThreshold"`
	}
	service struct {
		object `yaml:",inline"`
		Spec   struct {
			Type                  string
			ExternalTrafficPolicy string `yaml:"externalTrafficPolicy"`
			SessionAffinity       string `yaml:"sessionAffinity"`
			Selector              map[string]string
			Ports                 []struct {
				Name       string
				Port       int
				TargetPort string `yaml:"targetPort"`
			}
		}
	}
	disruptionBudget struct {
		object `yaml:",inline"`
		Spec   struct {
			MaxUnavailable int    `yaml:"maxUnavailable"`
			UnhealthyPods  string `yaml:"unhealthyPodEvictionPolicy"`
			Selector       selector
		}
	}
)

type manifest struct {
	job        job
	config     configMap
	deployment deployment
	service    service
	budget     disruptionBudget
	caddyfile  string
}

func readManifest(t *testing.T) manifest {
	t.Helper()
	var m manifest
	kinds := map[string]any{
		"batch/v1 Job": &m.job, "v1 ConfigMap": &m.config, "apps/v1 Deployment": &m.deployment, "v1 Service": &m.service,
		"policy/v1 PodDisruptionBudget": &m.budget,
	}
	for document := range strings.SplitSeq(process.Read(t, shipped+"kubernetes.yaml"), "\n---\n") { // as kubectl does: no anchor reaches beyond
		var o object
		if err := yaml.Unmarshal([]byte(document), &o); err != nil {
			t.Fatal(err)
		}
		kind := o.APIVersion + " " + o.Kind
		into, ok := kinds[kind]
		if !ok {
			t.Fatalf("%s is there twice, or unknown", kind)
		}
		delete(kinds, kind)
		decoder := yaml.NewDecoder(strings.NewReader(document))
		decoder.KnownFields(true)
		if err := decoder.Decode(into); err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		if err := decoder.Decode(new(any)); !errors.Is(err, io.EOF) {
			t.Fatalf("%s: more than one document, %v", kind, err)
		}
	}
	if len(kinds) > 0 {
		t.Fatalf("missing: %v", slices.Collect(maps.Keys(kinds)))
	}
	m.caddyfile = m.config.Data["Caddyfile"]
	return m
}

func TestManifestFitsTogether(t *testing.T) {
	m := readManifest(t)
	pod := m.deployment.Spec.Template
	labels, c := pod.Metadata.Labels, pod.Spec.Containers[0]
	for what, s := range map[string]map[string]string{
		"Deployment": m.deployment.Spec.Selector.MatchLabels, "Service": m.service.Spec.Selector, "budget": m.budget.Spec.Selector.MatchLabels,
		"spread": pod.Spec.TopologySpreadConstraints[0].LabelSelector.MatchLabels,
	} {
		if len(s) == 0 || !maps.Equal(s, labels) {
			t.Errorf("the %s selects %v, and the pods are %v", what, s, labels)
		}
	}

	// Edges must see the client's address, and a session of the dashboard must find its edge again.
	if s := m.service.Spec; s.ExternalTrafficPolicy != "Local" || s.SessionAffinity != "ClientIP" {
		t.Errorf("externalTrafficPolicy %s and sessionAffinity %s", s.ExternalTrafficPolicy, s.SessionAffinity)
	}

	// Ports: of the Service, of the container, of the Caddyfile.
	ports := make(map[string]int)
	for _, p := range c.Ports {
		ports[p.Name] = p.ContainerPort
	}
	if want := map[string]int{"http": 8080, "https": 8443, "health": 8081}; !maps.Equal(ports, want) {
		t.Errorf("ports %v, want %v", ports, want)
	}
	for _, line := range []string{"http_port 8080", "https_port 8443", "http://:8081 {\n\trekall_health"} {
		if !strings.Contains(m.caddyfile, line) {
			t.Errorf("the Caddyfile lacks %s", line)
		}
	}
	for _, p := range m.service.Spec.Ports {
		if ports[p.TargetPort] == 0 || p.TargetPort == "health" {
			t.Errorf("the Service leads to %q", p.TargetPort)
		}
	}
	if got := c.LivenessProbe.HTTPGet; got.Path != "/rekall/live" || got.Port != "health" {
		t.Errorf("liveness: %+v", got)
	}
	if got := c.ReadinessProbe.HTTPGet; got.Path != "/rekall/ready" || got.Port != "health" {
		t.Errorf("readiness: %+v", got)
	}

	if keep := "regex: " + labels["app.kubernetes.io/name"] + ";health;Running\n"; !strings.Contains(process.Read(t, runbook), keep) {
		t.Errorf("the runbook's Prometheus does not look for %q", keep)
	}

	// Volumes: each that is mounted is there, and the files that the Caddyfile names are in them.
	volumes := make(map[string]bool)
	for _, v := range pod.Spec.Volumes {
		volumes[v.Name] = true
	}
	mounted := make(map[string]bool)
	for _, v := range c.VolumeMounts {
		mounted[v.MountPath] = true
		if !volumes[v.Name] || v.ReadOnly != (v.MountPath != "/data") {
			t.Errorf("%+v", v)
		}
	}
	for _, dir := range []string{"/etc/rekall", "/run/secrets/rekall", "/run/secrets/tls", "/data"} {
		if !mounted[dir] {
			t.Errorf("%s is not mounted", dir)
		}
	}

	if !strings.Contains(m.caddyfile, "shutdown_delay 10s") {
		t.Error("the pod stops before load balancers know")
	}
	if c.ReadinessProbe.PeriodSeconds*c.ReadinessProbe.FailureThreshold >= 10 {
		t.Error("the pod is found not ready after shutdown_delay only")
	}
	if u := m.deployment.Spec.Strategy.RollingUpdate.MaxUnavailable; u == nil || *u != 0 || m.deployment.Spec.Replicas <= m.budget.Spec.MaxUnavailable {
		t.Error("an update takes edges away before others are ready")
	}
	if p := m.budget.Spec.UnhealthyPods; p != "AlwaysAllow" {
		t.Errorf("eviction policy %q: no node can be drained while Postgres is away", p)
	}
	migrate := m.job.Spec.Template.Spec.Containers[0]
	if migrate.Image != c.Image || migrate.Env[0].Name != "REKALL_DATABASE_URL" || migrate.Args[0] != "migrate" {
		t.Errorf("the Job runs %s %v", migrate.Image, migrate.Args)
	}
}

// lastCounts is how many seconds the last counts of use may take while Postgres hangs: 5 for the flush, and the ends of statements and
// connections that nobody answers, on a machine that is busy.
const lastCounts = 12

// TestEdgesStopInOrderBeforeTheyAreKilled: without grace_period, Caddy waits for ever for the end of a stream.
func TestEdgesStopInOrderBeforeTheyAreKilled(t *testing.T) {
	m := readManifest(t)
	timeout := regexp.MustCompile(`(?m)^TimeoutStopSec=(\d+)s$`).FindStringSubmatch(process.Read(t, shipped+"rekall-gateway.service"))
	if timeout == nil {
		t.Fatal("the unit has no TimeoutStopSec")
	}
	systemd, kubelet := seconds(t, timeout[1]), m.deployment.Spec.Template.Spec.TerminationGracePeriodSeconds
	killedAfter := map[string]int{m.caddyfile: kubelet, process.Read(t, "../../Caddyfile.example"): systemd}
	for _, block := range blocksOf(t, guide, "caddyfile") {
		killedAfter[block] = systemd
	}
	for page, words := range map[string]string{ // beside what they say of the flush alone
		shipped + "rekall-gateway.service": "up to %ds", shipped + "kubernetes.yaml": "up to %ds", runbook: "up to %d where Postgres hangs",
		"../../README.md": "up to %d s where it hangs",
	} {
		if words = fmt.Sprintf(words, lastCounts); !strings.Contains(process.Read(t, page), words) {
			t.Errorf("%s does not say how long the last counts may take: %s", page, words)
		}
	}
	for caddyfile, limit := range killedAfter {
		takes := lastCounts
		for _, option := range regexp.MustCompile(`(?m)^\t(?:shutdown_delay|grace_period) (\d+)s$`).FindAllStringSubmatch(caddyfile, -1) {
			takes += seconds(t, option[1])
		}
		if !strings.Contains(caddyfile, "\n\tgrace_period ") || takes >= limit {
			t.Errorf("a stop takes %d s, for ever without grace_period, and the edge is killed after %d s:\n%s", takes, limit, caddyfile)
		}
	}
}

func seconds(t *testing.T, digits string) int {
	t.Helper()
	n, err := strconv.Atoi(digits)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestPodsTrustAuthoritiesOfTheOperators, and start without any.
func TestPodsTrustAuthoritiesOfTheOperators(t *testing.T) {
	m := readManifest(t)
	for name, pod := range map[string]podTemplate{"Job": m.job.Spec.Template, "Deployment": m.deployment.Spec.Template} {
		dir, volume, optional := "", "", false
		for _, e := range pod.Spec.Containers[0].Env {
			if e.Name == "SSL_CERT_DIR" {
				dir = e.Value
			}
		}
		for _, mount := range pod.Spec.Containers[0].VolumeMounts {
			if mount.MountPath == dir && mount.ReadOnly {
				volume = mount.Name
			}
		}
		for _, v := range pod.Spec.Volumes {
			optional = optional || v.Name == volume && v.ConfigMap != nil && v.ConfigMap.Name == "rekall-authorities" && v.ConfigMap.Optional
		}
		if !optional {
			t.Errorf("%s: SSL_CERT_DIR %q, of volume %q, is not the ConfigMap's", name, dir, volume)
		}
	}
}

// TestJobIsAppliedBeforeTheRest by the commands in the manifest: a Job cannot be changed, and edges must not start ahead of their schema.
func TestJobIsAppliedBeforeTheRest(t *testing.T) {
	m := readManifest(t)
	var label string
	for name, value := range m.job.Metadata.Labels {
		label = name + "=" + value
	}
	for _, o := range []metadata{m.config.Metadata, m.deployment.Metadata, m.service.Metadata, m.budget.Metadata} {
		if len(o.Labels) > 0 {
			t.Errorf("%s is selected by %v", o.Name, o.Labels)
		}
	}
	job := m.job.Metadata.Name
	order := strings.Join([]string{
		"#   kubectl delete job " + job + " --ignore-not-found", "#   kubectl apply -f kubernetes.yaml -l " + label,
		"#   kubectl wait --for=condition=complete --timeout=5m job/" + job,
		"#   kubectl apply -f kubernetes.yaml -l " + strings.Replace(label, "=", "!=", 1),
	}, "\n")
	if label == "" || !strings.Contains(process.Read(t, shipped+"kubernetes.yaml"), "\n"+order+"\n") {
		t.Errorf("the manifest does not say\n%s", order)
	}
}

func TestPodsHaveNoPrivilege(t *testing.T) {
	m, im := readManifest(t), readImage(t)
	for name, pod := range map[string]podTemplate{"Job": m.job.Spec.Template, "Deployment": m.deployment.Spec.Template} {
		s := pod.Spec.SecurityContext
		if !s.RunAsNonRoot || im.user != "65532:65532" || s.RunAsUser != 65532 || s.RunAsGroup != 65532 || s.SeccompProfile.Type != "RuntimeDefault" {
			t.Errorf("%s: %+v", name, s)
		}
		if pod.Spec.AutomountServiceAccountToken == nil || *pod.Spec.AutomountServiceAccountToken {
			t.Errorf("%s: it has a token for Kubernetes' API", name)
		}
		c := pod.Spec.Containers[0]
		if p := c.SecurityContext; p.AllowPrivilegeEscalation == nil || *p.AllowPrivilegeEscalation || !p.ReadOnlyRootFilesystem ||
			!slices.Equal(p.Capabilities.Drop, []string{"ALL"}) {
			t.Errorf("%s: %+v", name, p)
		}
		if c.Resources.Limits.Memory == "" || c.Resources.Requests.Memory == "" || c.Resources.Requests.CPU == "" {
			t.Errorf("%s: %+v", name, c.Resources)
		}
	}
}

// The Caddyfile as it stands there is tried in TestContainerServesFromAReadOnlyRootAsNobody.
func TestManifestIsRefusedWithAMisspeltField(t *testing.T) {
	decoder := yaml.NewDecoder(strings.NewReader("kind: Deployment\nspec: {template: {spec: {securityContext: {runAsNonroot: true}}}}"))
	decoder.KnownFields(true)
	if err := decoder.Decode(new(deployment)); err == nil || !strings.Contains(err.Error(), "runAsNonroot") {
		t.Errorf("got %v", err)
	}
}

func TestMigrationJobRunsTheCommandOfTheGuide(t *testing.T) {
	t.Parallel()
	m, r := readManifest(t), newRig(t)
	edge, admin := "", ""
	args := slices.Clone(m.job.Spec.Template.Spec.Containers[0].Args)
	for i, arg := range args { // roles belong to the whole server, which other tests use
		switch arg {
		case "rekall_edge":
			edge = pgtest.Role(t, r.database)
			args[i] = edge
		case "rekall_admin":
			admin = pgtest.Role(t, r.database)
			args[i] = admin
		}
	}
	output := command(t, program, r.database, args...)
	if edge == "" || !strings.Contains(output, "Role "+edge+" has") || !strings.Contains(output, "Role "+admin+" has") {
		t.Errorf("got %s", output)
	}
}
